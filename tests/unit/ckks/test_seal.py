import os
from pathlib import Path

import numpy as np
import pytest

from shelora.ckks import INSECURE_TOY, STANDARD, FullCiphertext
from shelora.ckks.seal import SealContext, seal_context
from shelora.errors import DomainError, Reason

DEGREE = INSECURE_TOY.poly_degree


@pytest.mark.parametrize("parameters", [INSECURE_TOY, STANDARD])
def test_the_transform_is_undone_by_its_inverse(parameters, rng):
    context = seal_context(parameters)
    residues = rng.integers(0, parameters.modulus, parameters.poly_degree, dtype=np.uint64)
    assert (context.from_ntt(context.to_ntt(residues)) == residues).all()


def test_a_constant_is_the_same_in_both_orders():
    context = seal_context(INSECURE_TOY)
    constant = np.zeros(DEGREE, dtype=np.uint64)
    constant[0] = 5
    assert (context.to_ntt(constant) == 5).all()


def test_a_context_is_built_once():
    assert seal_context(INSECURE_TOY) is seal_context(INSECURE_TOY)


def test_seal_refuses_what_our_checks_would_have_missed():
    """A second line of defence: SEAL's own loader checks coefficients too."""
    residues = np.full(DEGREE, INSECURE_TOY.modulus, dtype=np.uint64)
    with pytest.raises(DomainError) as error:
        seal_context(INSECURE_TOY).load_full(FullCiphertext(residues, residues))
    assert error.value.reason is Reason.INTERNAL


def test_a_library_of_another_version_stops_the_start(monkeypatch):
    monkeypatch.setattr("shelora.ckks.seal._library_version", lambda: (9, 9))
    with pytest.raises(DomainError) as error:
        SealContext(INSECURE_TOY)
    assert error.value.reason is Reason.INTERNAL


def test_a_library_with_another_layout_stops_the_start(monkeypatch):
    saved = SealContext.save
    monkeypatch.setattr(SealContext, "save", lambda self, native: b"\0" + saved(self, native))
    with pytest.raises(DomainError, match="layout") as error:
        SealContext(INSECURE_TOY)
    assert error.value.reason is Reason.INTERNAL


def test_a_system_without_memory_files_is_named(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(DomainError, match="Linux") as error:
        SealContext(INSECURE_TOY)
    assert error.value.reason is Reason.CONFIGURATION_INVALID


def test_no_file_descriptor_is_left_open():
    context = seal_context(INSECURE_TOY)
    before = len(list(Path("/proc/self/fd").iterdir()))
    bad = np.full(DEGREE, 2**63, dtype=np.uint64)
    good = np.zeros(DEGREE, dtype=np.uint64)
    for _ in range(20):
        context.read_full(context.load_full(FullCiphertext(good, good)))
        with pytest.raises(DomainError):
            context.load_full(FullCiphertext(bad, bad))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
