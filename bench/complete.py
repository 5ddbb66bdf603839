"""The complete mode, whole: four clients deal to a committee and send sketches, servers add, clients open the sum.

Certificates come from a certificate authority in this process; nothing else is simulated. The first part is a round
whose bounds follow from the learning rate, later ones have the bounds that a result left, as in a federation.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from bench.additive import Cohort
from bench.workload import Costs, Workload
from services.key_authority.ca import RootFile
from services.key_authority.sealer import Sealer, SealingKey
from shelora.additive.sampler import Csprng
from shelora.committee.certificate import assemble
from shelora.committee.dealer import Dealer
from shelora.committee.dealing import shown_to
from shelora.committee.keys import KeySet
from shelora.committee.reader import open_round
from shelora.committee.statements import Signer
from shelora.committee.verdict import Checked, judge
from shelora.federation import ProtectionSpec
from shelora.lora.aggregate import aggregate_shard
from shelora.lora.codec import decode_result, encode_update, validate_update
from shelora.lora.kind import Contribution
from shelora.lora.layout import Layout, Matrix, Tensor
from shelora.lora.shards import FactoredUpdate, Float32, Float64, LoraFactors
from shelora.lora.sketches import Exponents, Sketch, Sketcher, best_cut
from shelora.lora.sums import sketch_values, terms_of
from shelora.obfuscation import SECRET_BYTES, Obfuscation
from shelora.strategies import complete
from shelora.strategies.agents.complete import COMPLETE
from shelora.strategies.agents.port import AgentContext, OpenedSum, Summand, mean_noise
from shelora.strategies.port import RoundTerms
from shelora.v1 import committee_pb2 as pb

LARGEST_MOVE: Final = 0.01
"""Learning rate times local steps, 0.0002 and 50: what the first round's bounds have room for."""
ERROR_ROWS: Final = 400
"""Rows of ΔW compared at a time: they stay in the processor's cache."""


@dataclass(kw_only=True)
class Complete:
    """What was measured, over the whole round."""

    values: int = 0
    """Of one client."""
    sketch: tuple[int, int, int] = (0, 0, 0)
    """k, l, s."""
    profile: str = ""
    shards: int = 0
    protection: Costs = field(default_factory=Costs)
    """Committee keys, sketches, encryption, serialization, hashes and dealing, all clients."""
    validation: Costs = field(default_factory=Costs)
    """What servers check of arriving shards, all clients."""
    aggregation: Costs = field(default_factory=Costs)
    """Shard bytes to result bytes."""
    committee: Costs = field(default_factory=Costs)
    """Dealings checked, set certified, shares released: all members."""
    restoration: Costs = field(default_factory=Costs)
    """The sum opened and every matrix restored, one client."""
    upload_bytes: int = 0
    """All that one client sends: shards and dealing."""
    download_bytes: int = 0
    """All that one client fetches: committee keys, shards and opening."""
    clipped: int = 0
    max_abs_error: float = 0.0
    """Largest difference to the same sketches summed in float64 without encryption, after the cut."""
    largest_entry: float = 0.0
    """Of the exact ΔW."""
    cut_error: float = 0.0
    """Norm of ΔW less what is restored, over that of ΔW: mean over the matrices."""
    best_cut_error: float = 0.0
    """The same of the best cut to that rank."""

    @property
    def relative_error(self) -> float:
        """Largest error beyond the cut, over the largest entry of ΔW."""
        return self.max_abs_error / self.largest_entry

    def encrypt_us_per_value(self, clients: int) -> float:
        """A client's protection, in microseconds of CPU a value."""
        return 1e6 * self.protection.usual.cpu_s / (clients * self.values)

    def aggregate_ns_per_value_and_client(self, clients: int) -> float:
        """What servers spend, in nanoseconds of CPU."""
        return 1e9 * self.aggregation.usual.cpu_s / (clients * self.values)


@dataclass(frozen=True)
class Model:
    """The workload's matrices, as a client's model."""

    workload: Workload
    tensors: tuple[Tensor, ...] = ()

    @property
    def rank(self) -> int:
        return self.workload.rank

    @property
    def scaling(self) -> float:
        return self.workload.scaling

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(Matrix(name, *self.workload.shape(name)) for name in self.workload.names)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a client trained."""

    factors: Mapping[str, LoraFactors]
    exponents: Mapping[str, Exponents] = field(default_factory=dict)
    tensors: Mapping[str, Float32] = field(default_factory=dict)
    frozen: Mapping[str, LoraFactors] = field(default_factory=dict)


class LazyFactors(Mapping[str, LoraFactors]):
    """A client's factors, made when they are read: for measuring what protection itself holds in memory."""

    def __init__(self, workload: Workload, client: int) -> None:
        self._workload, self._client = workload, client

    def __getitem__(self, name: str) -> LoraFactors:
        return self._workload.factors(self._client, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._workload.names)

    def __len__(self) -> int:
        return len(self._workload.names)


class Round:
    """One round: its context, the committee's keys, what clients sent."""

    def __init__(self, workload: Workload, number: int) -> None:
        self.workload, self.number = workload, number
        self.model = Model(workload)
        round_ = RoundTerms(key_id=b"", max_rank=workload.rank)
        self.layout: Layout = complete.STRATEGY.layout(self.model, ProtectionSpec(), round_)
        self.obfuscation = Obfuscation(bytes(SECRET_BYTES), epoch=1)
        self._cohort = _cohort(workload.clients)
        self.context = replace(
            self._cohort.context,
            round_number=number,
            layout_digest=self.layout.digest,
            parameters=terms_of(self.layout).additive,
            most_weight=1,
        )
        self._order = self.context.committee(self.obfuscation.committee_key())
        cohort = replace(self._cohort, context=self.context)
        self.members = [
            cohort.member(name, self.obfuscation.committee_key(), self.obfuscation.answer_key())
            for name in self._order.members
        ]
        self.statements = [member.key for member in self.members]
        self.dealt: dict[str, pb.DealtShares] = {}
        self.clipped = 0

    @property
    def signers(self) -> list[Signer]:
        """Of the clients, in the cohort's order."""
        return [self._cohort.signers[name] for name in self.context.cohort]

    def protected(self, client: int, trained: Trained) -> Iterator[bytes]:
        """The shards of one client's update, then nothing: its dealing is in `dealt`."""
        keys = KeySet.of(self.context, self._order, self.statements, self._cohort.trust)
        dealer = Dealer(self.context, keys, self.signers[client], Csprng.fresh())
        context = self._agent(summand=Summand(encryption=dealer.encryption, share=1.0))
        digests = []
        for content in COMPLETE.protect(self.layout, trained, context):
            data = encode_update(self.layout, content)
            digests.append(hashlib.sha256(data).digest())
            yield data
        self.dealt[self.context.cohort[client]] = dealer.deal(digests, 1)
        self.clipped += context.clipping.clipped

    def decided(self) -> pb.Opening:
        """The committee's work: dealings checked, the set certified, shares released."""
        keys = KeySet.of(self.context, self._order, self.statements, self._cohort.trust)
        for member in self.members:
            for name, dealt in self.dealt.items():
                share = shown_to(self.context, dealt, member.position)
                assert share is not None
                assert member.receive(name, share, keys) is None
        checks = {m.position: Checked.read(self.context, m.check().content) for m in self.members}
        verdict = judge(self.context, frozenset(self.dealt), checks)
        certificate = assemble(self.context, [m.certify(verdict.contributors) for m in self.members])
        assert certificate is not None
        return pb.Opening(certificate=certificate, answers=[m.release(certificate) for m in self.members])

    def aggregated(self, load: Callable[[int, str], bytes]) -> Iterator[bytes]:
        """The result shards. Args: load: an update shard by index and client."""
        members = [Contribution(str(client), 1.0) for client in range(self.workload.clients)]
        for index in range(len(self.layout.shards)):
            yield aggregate_shard(self.layout, index, members, partial(load, index))

    def restored(
        self, results: Iterable[bytes], opening: pb.Opening
    ) -> Iterator[tuple[str, FactoredUpdate, Exponents]]:
        """What a client decrypts, matrix by matrix."""
        opened = open_round(
            self.context,
            self._order,
            opening,
            self.obfuscation.answer_key(),
            self._cohort.trust,
            Csprng.fresh(),
        )
        count, shares = len(opened.contributors), opened.total_weight / self.context.most_weight
        noise = mean_noise(self.context.parameters, count, self.context.most_contributors, shares)
        context = self._agent(opened=OpenedSum(opener=opened.sum_opener(), shares=shares, noise=noise))
        contents = (decode_result(self.layout, index, data) for index, data in enumerate(results))
        for part in COMPLETE.restored(self.layout, contents, context):
            for name, update in part.matrices.items():
                yield name, update, part.exponents[name]

    def unencrypted(self, matrix: Matrix, factors: list[LoraFactors]) -> FactoredUpdate:
        """The cut of the mean in float64: the same sketches, no bounds, no encryption."""
        sketcher = Sketcher.draw(self.obfuscation, terms_of(self.layout), matrix, self.number)
        sketches = [
            sketcher.sketch(self.model.scaling * f.B.astype(np.float64), f.A.astype(np.float64))
            for f in factors
        ]
        parts = (sum(getattr(s, part) for s in sketches) / len(sketches) for part in "PNZ")
        return best_cut(sketcher.recovered(Sketch(*parts)), self.layout.max_rank)

    def _agent(self, *, summand: Summand | None = None, opened: OpenedSum | None = None) -> AgentContext:
        return AgentContext(
            model=self.model,
            obfuscation=self.obfuscation,
            round_number=self.number,
            largest_move=LARGEST_MOVE,
            summand=summand,
            opened=opened,
        )


class Measurement:
    """Runs rounds one after the other, and compares the last one's result with float64."""

    def __init__(self, workload: Workload) -> None:
        self.found = Complete()
        self._workload = workload
        self._factors = [
            {name: workload.factors(client, name) for name in workload.names}
            for client in range(workload.clients)
        ]
        self._exponents: dict[str, Exponents] = {}
        self._number = 0
        self._last: tuple[Round, list[bytes], pb.Opening] | None = None

    def part(self) -> None:
        """One whole round."""
        self._number += 1
        found, round_ = self.found, Round(self._workload, self._number)
        with found.protection.measured():
            updates = [
                list(round_.protected(client, Trained(factors=factors, exponents=self._exponents)))
                for client, factors in enumerate(self._factors)
            ]
        with found.validation.measured():
            for shards in updates:
                for index, data in enumerate(shards):
                    validate_update(round_.layout, index, data)
        with found.committee.measured():
            opening = round_.decided()
        with found.aggregation.measured():
            results = list(round_.aggregated(lambda index, client: updates[int(client)][index]))
        self._last = round_, results, opening
        self._sizes(round_, updates[0], results, opening)
        if not self._exponents:
            self._exponents = {name: exponents for name, _, exponents in round_.restored(results, opening)}

    def compare(self, step: Callable[[], None]) -> None:
        """Restores the last result and compares every entry of every ΔW; `step` is called after each matrix."""
        assert self._last is not None
        round_, results, opening = self._last
        with self.found.restoration.measured():
            restored = {name: update for name, update, _ in round_.restored(results, opening)}
        for matrix in round_.model.matrices:
            factors = [own[matrix.name] for own in self._factors]
            _compare(round_, matrix, factors, restored.pop(matrix.name), self.found)
            step()

    def _sizes(self, round_: Round, update: list[bytes], results: list[bytes], opening: pb.Opening) -> None:
        terms, found = terms_of(round_.layout), self.found
        found.values = sum(sketch_values(terms, matrix) for matrix in round_.layout.matrices)
        found.sketch = terms.sketch_columns, terms.sketch_rows, terms.core
        found.profile, found.shards = terms.profile, len(round_.layout.shards)
        dealing = next(iter(round_.dealt.values()))
        keys = sum(statement.ByteSize() for statement in round_.statements)
        found.upload_bytes = sum(map(len, update)) + dealing.ByteSize()
        found.download_bytes = sum(map(len, results)) + opening.ByteSize() + keys
        found.clipped += round_.clipped


def _compare(
    round_: Round, matrix: Matrix, factors: list[LoraFactors], update: FactoredUpdate, found: Complete
) -> None:
    clear = round_.unencrypted(matrix, factors)
    weight = round_.workload.scaling / len(factors)
    B = np.hstack([weight * f.B.astype(np.float64) for f in factors])
    A = np.vstack([f.A.astype(np.float64) for f in factors])
    for first in range(0, matrix.out_features, ERROR_ROWS):
        rows = slice(first, first + ERROR_ROWS)
        found.largest_entry = max(found.largest_entry, float(np.abs(B[rows] @ A).max()))
        difference = clear.Q[rows] @ clear.M - update.Q[rows] @ update.M
        found.max_abs_error = max(found.max_abs_error, float(np.abs(difference).max()))
    exact = singular_values(B, A)
    size, count = float(np.linalg.norm(exact)), len(round_.layout.matrices)
    missing = singular_values(np.hstack([B, -update.Q]), np.vstack([A, update.M]))
    found.cut_error += float(np.linalg.norm(missing)) / size / count
    found.best_cut_error += float(np.linalg.norm(exact[round_.layout.max_rank :])) / size / count


def singular_values(B: Float64, A: Float64) -> Float64:
    """Of B A, B [out, r] and A [r, in]; the product is never formed."""
    values: Float64 = np.linalg.svd(np.linalg.qr(B)[1] @ np.linalg.qr(A.T)[1].T, compute_uv=False)
    return values


def _cohort(size: int) -> Cohort:
    with TemporaryDirectory() as folder:
        root = RootFile(Path(folder) / "root", Sealer(SealingKey(bytes(32))), "5e" * 16).load_or_create()
        return Cohort.of(size, root)
