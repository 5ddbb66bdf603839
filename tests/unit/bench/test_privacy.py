import torch

from bench.privacy import Lower


def test_what_lies_below_comes_back_as_it_was(tmp_path, monkeypatch):
    known = {(1, 2, 3): torch.randn(3, 4), (7,): torch.randn(1, 4)}
    monkeypatch.setattr(Lower, "known", dict(known))
    Lower.save(tmp_path / "hidden.safetensors")
    Lower.known.clear()
    Lower.load(tmp_path / "hidden.safetensors")
    assert list(Lower.known) == list(known)
    assert all(torch.equal(Lower.known[ids], states) for ids, states in known.items())
