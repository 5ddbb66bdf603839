"""What an operator says about a federation: one YAML file, checked completely before anything starts.

The fields and ranges are those of `FederationSpec` in coordinator.proto, which crosses the wire; the defaults are
here. A value that passed these classes is sound: nothing behind them checks it again.
"""

import re
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

from google.protobuf.message import Message
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from shelora.accounting import LARGEST_MULTIPLIER, MULTIPLIER_UNIT, epsilon_of, multiplier_for
from shelora.additive import parameters as additive
from shelora.ckks.parameters import PROFILES, STANDARD
from shelora.configuration import StrictModel, explain, invalid, read_yaml
from shelora.errors import DomainError, Reason
from shelora.levels import Level
from shelora.lora.noise import ClientNoise
from shelora.strategies.port import Strategy
from shelora.strategies.registry import DEFAULT, UNNAMED, strategies, strategy_of
from shelora.tasks import ANSWERS, SEQUENCE_CLASSIFICATION, TASKS, LossOn, TaskName
from shelora.text import printable
from shelora.v1 import coordinator_pb2 as pb


def _printable(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "use a character that can be seen")
    if printable(text) != text:
        raise PydanticCustomError("characters", "remove the control characters")
    return text


ABSENT: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "protection": MappingProxyType({"mode": UNNAMED, "clear_bits": 32, "figures": "none"}),
        "round": MappingProxyType({"clients": 2, "min_updates": 2}),
    }
)
"""What absence on the wire means where the default has changed: what it meant before.

A caller of today sends every field. One that leaves these out relies on what that meant, and must not get another
federation than it asked for.
"""


def _regular(text: str) -> str:
    try:
        re.compile(text)
    except (
        re.error,
        OverflowError,
        RecursionError,
    ) as error:  # of a{99999999999}, and of hundreds of brackets
        raise PydanticCustomError(
            "regular_expression", "is not a regular expression: {why}", {"why": str(error)}
        ) from None
    return text


Name = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_printable)]
Names = Annotated[tuple[Name, ...], Strict(strict=False)]
"""A list in YAML, a tuple here."""
Indices = Annotated[tuple[Annotated[int, Field(ge=0, le=100_000)], ...], Strict(strict=False)]
Schedule = Literal["constant", "linear", "cosine"]
MAX_ROUNDS: Final = 10_000
"""Training rounds of a federation."""
ALL_LINEAR: Final = "all-linear"
"""In place of names: every linear layer but the head."""


class Spec(StrictModel):
    """Refuses values of another type, too."""

    model_config = ConfigDict(strict=True)


def one_step(mode: str, local_steps: int) -> str:
    """What is unwise about so few local steps in that mode, with the remedy; "" for nothing."""
    if local_steps != 1 or not strategy_of(mode).shows_factors:
        return ""
    return (
        f"training.local_steps is 1, and under {mode} servers see factors of every update: one step's tell which "
        "sentences were in a batch, and at 32 bits the sentences themselves (docs/threat-model.md). Use at least 10 "
        "steps, or protection.mode: complete"
    )


class TrainingSpec(Spec):
    """What training agents agree on; rank, alpha and budget are each client's own."""

    base_model: Name
    """Base model every agent must have, by the name its agents know it under."""

    task: TaskName = SEQUENCE_CLASSIFICATION
    """What the model learns; it decides the head, the loss and what `correct` counts in evaluations."""

    labels: Names = ()
    """Class names in order of their index, at least two; for classification of texts and images alone."""

    target_modules: Annotated[Names, Field(min_length=1)] = ("query", "value")
    """Suffixes of module names to adapt, or all-linear: every linear layer but the head. The attention's query and
    value carry most of LoRA's effect."""

    target_layers: Indices = ()
    """Of them, those in these layers, from 0; empty for all. A module's layer is the first number in its name."""

    target_pattern: Annotated[str, StringConstraints(max_length=512), AfterValidator(_regular)] = ""
    """Of them, those whose whole name in the base model matches this regular expression; empty for all."""

    modules_to_save: Names = ()
    """Suffixes of names of modules to train and average whole, from the base model's values, as in PEFT. They travel
    whole in every round, and no value may exceed tensor_bound."""

    local_steps: Annotated[int, Field(ge=1, le=100_000)] = 20
    """Optimizer steps a round: more drift apart between clients, fewer waste the round's traffic. Never 1 under
    `selective`: what travels in the clear then tells which sentences an agent trained on."""

    local_epochs: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Passes over its data that a client trains a round, in no more than `local_steps` steps; 0 always trains
    `local_steps`."""

    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    """Examples a step."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Largest learning rate; LoRA takes about ten times that of full fine-tuning."""

    learning_rate_schedule: Schedule = "constant"
    """How it falls over all rounds, to a hundredth in the end."""

    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    """Steps in which it rises from 0, counted over all rounds, `local_steps` a round."""

    max_rank: Annotated[int, Field(ge=1, le=1024)] = 64
    """Largest rank that a client may join with. What updates and results cost everyone grows with the largest rank."""

    initial_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """What initial factors and heads follow from: two federations of one seed start alike. 0 takes them from a secret
    of the agents. Never under `selective`, whose servers must not know the initial A."""

    learning_rate_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from one round to the next. Uneven data makes clients drift apart; smaller steps in
    later rounds let their average settle."""

    max_tokens: Annotated[int, Field(ge=1, le=131_072)] = 128
    """Tokens an example is cut to, at least 2 for causal-lm, 8 for chat; time and memory of a step grow with it."""

    calibration_examples: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Examples that sensitivity scores are measured on; the ranking settles within some dozens."""

    evaluation_examples: Annotated[int, Field(ge=0, le=2**31 - 1)] = 256
    """Test examples after each round, 0 for none; after the last round, all."""

    evaluation_every: Annotated[int, Field(ge=1, le=MAX_ROUNDS)] = 1
    """Rounds from one evaluation to the next: 1 evaluates every result, 5 those of rounds 5, 10, and so on. The last
    result is always evaluated. For models whose evaluation takes long beside `local_steps`."""

    loss_on: LossOn = ANSWERS
    """Of conversations (chat), what is learnt: the assistant's answers alone, or everything, prompts included."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_linear_is_one_word(cls, value: object) -> object:
        return (value,) if value == ALL_LINEAR else value

    @model_validator(mode="after")
    def _all_linear_stands_alone(self) -> Self:
        if ALL_LINEAR in self.target_modules and len(self.target_modules) > 1:
            raise PydanticCustomError(
                "target_modules", "target_modules: all-linear stands alone: remove the other names"
            )
        return self

    def steps(self, examples: int) -> int:
        """Optimizer steps a round of a client with so many examples."""
        if not self.local_epochs:
            return self.local_steps
        return min(self.local_steps, max(1, ceil(self.local_epochs * examples / self.batch_size)))

    def seen(self, examples: int) -> int:
        """Different examples that a client with so many trains on in a round, at most."""
        return min(examples, self.steps(examples) * self.batch_size)

    @model_validator(mode="after")
    def _texts_have_a_next_token(self) -> Self:
        least = TASKS[self.task].least_tokens
        if self.max_tokens < least:
            raise PydanticCustomError(
                "max_tokens",
                "max_tokens = {value} leaves no next token to predict: {task} needs at least {least}",
                {"value": self.max_tokens, "task": self.task, "least": least},
            )
        return self

    @model_validator(mode="after")
    def _labels_fit_the_task(self) -> Self:
        labelled = TASKS[self.task].labelled
        if not labelled and self.labels:
            raise PydanticCustomError(
                "labels", "labels must be empty for {task}: remove them", {"task": self.task}
            )
        if labelled and len(set(self.labels)) < max(2, len(self.labels)):
            raise PydanticCustomError(
                "labels",
                "labels must name at least 2 different classes for {task}: list them",
                {"task": self.task},
            )
        return self


class StopSpec(Spec):
    """When a federation has trained long enough: no round was better than the best one for a while."""

    metric: Literal["loss", "accuracy"] = "loss"
    """What rounds are judged by: loss or accuracy on the agents' test examples, the median over agents."""

    patience: Annotated[int, Field(ge=1, le=MAX_ROUNDS)] = 3
    """Rounds after the best one, judged and not better, after which the federation ends."""

    threshold: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """A round is better that has more than this much less loss (nats) or more accuracy (0 to 1) than the best one."""

    def gain(self, value: float, best: float) -> float:
        """How much better a value is than the best one; below 0 if it is worse."""
        return value - best if self.metric == "accuracy" else best - value


class RoundSpec(Spec):
    """Rules of a federation's rounds."""

    rounds: Annotated[int, Field(ge=1, le=MAX_ROUNDS)] = 3
    """Training rounds."""

    clients: Annotated[int, Field(ge=2, le=100_000)] = 3
    """Clients that must have joined before the first round, at least `min_updates`."""

    min_updates: Annotated[int, Field(ge=2, le=100_000)] = 3
    """Updates below which a round is abandoned. An aggregate of one update is that update, so two is the least; of two,
    either client can work out the other's from the result, and tell a server."""

    deadline_s: Annotated[int, Field(ge=1, le=7 * 86_400)] = 3600
    """Seconds a round collects updates; longer while updates that it needs are on their way over a slow line. A week at
    most: state expires after it has not changed for longer."""

    target_updates: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Updates at which a training round closes without waiting for slower clients, at least `min_updates`; 0 waits for
    every client asked, or the deadline."""

    over_selection: Annotated[float, Field(ge=1, le=10)] = 1.3
    """Clients asked for every update wanted, so that those who drop out or are slow do not matter. Only with
    `target_updates`; without it every client is asked. Votes ask every client."""

    grace: Annotated[float, Field(ge=0, le=1000)] = 3.0
    """Once more than half of the clients asked have committed, and `min_updates`, the round waits for the others this
    many times as long again, at least a minute, then closes; 0 waits until the deadline. Raise it if devices differ
    much."""

    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Attempts at a round before the federation fails; an attempt fails when too few clients answer."""

    committee_s: Annotated[int, Field(ge=1, le=600)] = 60
    """Seconds that a committee waits for a silent member at each of its steps (keys, checks, signatures, answers). Too
    few, and rounds are lost to agents that are slow to answer; many, and one dead agent makes each of them longer."""

    replan_every_rounds: Annotated[int, Field(ge=0, le=MAX_ROUNDS)] = 0
    """Training rounds after which the plan is negotiated anew, 0 for never: sensitivities drift slowly."""

    replan_below_overlap: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of their top columns under the plan, relative to when it was new, below which agents negotiate anew; 0 for
    never. Agents score their columns every round for it and report the share in steps of 5 %."""

    stop: StopSpec | None = None
    """Ends the federation before its last round: {metric: accuracy, patience: 3, threshold: 0.005}, for example. None:
    all rounds are trained."""

    @model_validator(mode="after")
    def _enough_clients(self) -> Self:
        if self.clients < self.min_updates:
            raise PydanticCustomError(
                "clients",
                "clients = {clients} can never send min_updates = {least} updates: raise clients or lower min_updates "
                "(with 2, either client can work out the other's update from the result)",
                {"clients": self.clients, "least": self.min_updates},
            )
        if 0 < self.target_updates < self.min_updates:
            raise PydanticCustomError(
                "target_updates",
                "target_updates = {target} is less than min_updates = {least}: raise it, or set it to 0",
                {"target": self.target_updates, "least": self.min_updates},
            )
        return self


class ClientPrivacySpec(Spec):
    """Differential privacy of each client in the sums of `complete` (docs/privacy.md, "Clients in sums"). Exactly one
    of epsilon and noise_multiplier.
    """

    epsilon: Annotated[float, Field(gt=0, le=1000)] | None = None
    """What the sums of all rounds together may tell of one client: the noise follows from it."""

    noise_multiplier: Annotated[float, Field(ge=MULTIPLIER_UNIT, le=LARGEST_MULTIPLIER)] | None = None
    """Standard deviation of the noise that is counted on in a sum, over `clip`; epsilon follows from it."""

    delta: Annotated[float, Field(gt=0, lt=1)]
    """Probability that the promise does not hold: far below 1 / number of clients."""

    clip: Annotated[float, Field(gt=0, le=1e6)]
    """L2 norm that what one client changes in a round is scaled down to, over all its sketches and tensors."""

    tolerated: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Clients of a sum that may leave their noise out, or know it and tell: at least 1, as every member knows its own.
    The noise of the others, at least `updates` less these, is what the promise rests on."""

    sums: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Sums that the budget is for; 0: `round.rounds` as they are at creation. More leaves room for rounds that are lost
    after their updates were agreed on, and for `shelora federation extend`; each costs noise."""

    updates: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Clients that every sum has at least: `round.min_updates`, which 0 stands for."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise PydanticCustomError(
                "client_privacy", "give exactly one of epsilon (the budget) and noise_multiplier (the noise)"
            )
        if self.sums and self.epsilon is not None:
            try:
                multiplier_for(self.epsilon, self.delta, self.sums)
            except ValueError:
                raise PydanticCustomError(
                    "epsilon",
                    "epsilon = {epsilon} cannot be kept for {sums} sums with any noise: raise it",
                    {"epsilon": self.epsilon, "sums": self.sums},
                ) from None
        return self

    @property
    def multiplier(self) -> float:
        """The noise multiplier, given or found."""
        if self.epsilon is None:
            return self.noise_multiplier or 0.0
        return multiplier_for(self.epsilon, self.delta, self.sums)

    @property
    def promised(self) -> float:
        """Epsilon of all `sums` together, at delta, of a client whose changes are taken away or not."""
        return epsilon_of([self.multiplier] * self.sums, self.delta)

    @property
    def promised_replaced(self) -> float:
        """The same of a client whose data are replaced by others: its changes differ by up to twice the clip."""
        return epsilon_of([self.multiplier / 2] * self.sums, self.delta)


class ProtectionSpec(Spec):
    """How updates are protected."""

    mode: str = DEFAULT
    """How updates are protected. `complete`: nothing travels in the clear, and a committee of the round's clients opens
    their sum alone. `selective`, the paper's SHE-LoRA: each client encrypts its budget of columns and all tensors,
    under a key that all clients share. `none`: nothing, for comparison only."""

    parameters: str = STANDARD.name
    """CKKS profile by name; the default is 128-bit secure and the smallest on the wire. Not read by `complete`."""

    negotiation: Literal["sealed", "ope", "ope-refined"] = "sealed"
    """Under `selective`, how clients agree on columns: `sealed` adds up encrypted votes; `ope`, the paper's way, shows
    the coordinator the order of scores under secret labels; `ope-refined` shows it the same, and serves clients more
    evenly."""

    tensor_bound: Annotated[float, Field(gt=0, le=1e6)] = 4.0
    """Largest absolute value in a tensor that is averaged whole. An agent whose head outgrows it stops, so it must hold
    what all rounds together can reach: heads start within 0.1 and move by at most a learning rate a step. Precision is
    lost in proportion to it, and it is how far a hostile member can try to push a head."""

    clear_bits: Literal[16, 32] = 16
    """Bits in which `selective` sends what it does not encrypt: 16 (bfloat16) is half the traffic, and leaves attackers
    signs and rough sizes; 32 is the method as published, and gives texts away after one local step."""

    max_directions: Annotated[int, Field(ge=1, le=4096)] = 256
    """Most directions in an aggregate. The sum of all ranks is lossless; beyond, the result says what it left out."""

    common_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    """Under `ope`, the weight of what most clients name against what any client finds most sensitive; absent, all
    three weights of the paper are searched for."""

    coverage_floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of what a client could cover at its budget below which its next vote gains weight; 0 for never. It
    guarantees coverage of a score, not privacy: see docs/negotiation.md."""

    max_vote_weight: Annotated[float, Field(ge=1, le=64)] = 8.0
    """Most votes one client may come to have under a `coverage_floor`; sealed votes lose precision in proportion."""

    key_rotation_rounds: Annotated[int, Field(ge=0, le=MAX_ROUNDS)] = 0
    """Training rounds after which the keys are replaced, 0 for never: each time costs a vote. Revoking a client
    replaces them in any case, and so does `shelora federation rotate`."""

    client_privacy: ClientPrivacySpec | None = None
    """Under `complete`, how sums hide each client: {epsilon: 8, delta: 1e-5, clip: 0.5}, for example (docs/privacy.md).
    None: they do not."""

    figures: Literal["means", "none"] = "means"
    """Under `complete`, what is known of agents' accuracies and losses. `means`: they go into the encrypted sums, whose
    means over a round's agents are known, a round later, and no agent's own. `none`: each agent knows its own, and
    reports nothing, as under `client_privacy`."""

    @property
    def noise(self) -> ClientNoise | None:
        """What clients add to sums; None: nothing."""
        privacy = self.client_privacy
        if privacy is None:
            return None
        return ClientNoise(
            bound=self.tensor_bound,
            clip=privacy.clip,
            multiplier=privacy.multiplier,
            honest=privacy.updates - privacy.tolerated,
        )

    @property
    def mean_figures(self) -> bool:
        """Whether encrypted sums hold what clients tell of their examples, if the strategy has such sums."""
        return self.figures == "means"

    @property
    def strategy(self) -> Strategy:
        """The public half of the strategy that `mode` names."""
        return strategy_of(self.mode)

    @property
    def level(self) -> Level:
        """How strongly it protects, for what agents were promised."""
        return Level.of(self.mode, self.negotiation)

    @property
    def largest_vote(self) -> float:
        """Most votes that one client has."""
        return self.max_vote_weight if self.coverage_floor else 1.0

    @field_validator("mode")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in strategies():
            raise PydanticCustomError("mode", "use {known}", {"known": " or ".join(map(repr, strategies()))})
        return name

    @model_validator(mode="after")
    def _accepted(self) -> Self:
        try:
            self.strategy.accepts(self)
        except DomainError as error:
            raise PydanticCustomError("mode", "{why}", {"why": error.message}) from None
        return self

    @field_validator("parameters")
    @classmethod
    def _known_and_secure(cls, name: str) -> str:
        known = sorted(p.name for p in PROFILES.values() if p.secure)
        if name not in known:
            raise PydanticCustomError("profile", "use one of {known}", {"known": ", ".join(known)})
        return name


class ScreeningSpec(Spec):
    """Which updates are believed (docs/protocol.md, "Screening"). 0 turns a rule off."""

    max_update_norm: Annotated[float, Field(ge=0, le=1e12)] = 1e4
    """Norm above which an update is refused. Weights of a layer have norms below 100, updates norms of some per cent of
    that; the norm servers measure is about ten times as large."""

    max_norm_ratio: Annotated[float, Field(ge=0, le=1e6)] = 3.0
    """Norm above which an update is left out of the aggregate, as a multiple of the cohort's median, at least 2; one
    above half of that is scaled down to it. Honest updates differ with alpha, rank and data, in our tests by a factor
    of 2."""

    max_example_ratio: Annotated[float, Field(ge=0, le=1e6)] = 3.0
    """Examples of one client that count in the aggregate, as a multiple of the cohort's median, at least 1. Whatever it
    is, no client weighs more than a quarter, or 2/K of K where that is less, and up to four weigh the same: claims
    cannot be checked."""

    @model_validator(mode="after")
    def _ratios_leave_the_median_in(self) -> Self:
        for name, least in (("max_norm_ratio", 2), ("max_example_ratio", 1)):
            if 0 < getattr(self, name) < least:
                raise PydanticCustomError(
                    name,
                    "screening.{name} must be 0 (off) or at least {least}",
                    {"name": name, "least": least},
                )
        return self


class FederationSpec(Spec):
    """A federation, as its operator specified it."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")]
    """Name and identifier, 1 to 64 characters of a-z, 0-9 and -."""

    training: TrainingSpec
    """What agents train."""

    round: RoundSpec = RoundSpec()
    """How rounds run."""

    protection: ProtectionSpec = ProtectionSpec()
    """What is encrypted."""

    screening: ScreeningSpec = ScreeningSpec()
    """Which updates are believed."""

    @model_validator(mode="before")
    @classmethod
    def _fixed_at_creation(cls, given: Any) -> Any:  # noqa: ANN401 - whatever was written
        """What client privacy takes from the rounds stays as it is when these are extended."""
        try:
            privacy = given["protection"]["client_privacy"]
            rounds = {**RoundSpec().model_dump(), **given.get("round", {})}
            fixed = {"sums": privacy.get("sums") or rounds["rounds"]}
            fixed["updates"] = privacy.get("updates") or rounds["min_updates"]
            protection = {**given["protection"], "client_privacy": {**privacy, **fixed}}
        except (KeyError, TypeError, AttributeError):
            return given
        return {**given, "protection": protection}

    @model_validator(mode="after")
    def _clients_are_hidden(self) -> Self:
        privacy, rules = self.protection.client_privacy, self.round
        if privacy is None:
            return self
        if not self.protection.strategy.needs_committee:
            raise PydanticCustomError(
                "client_privacy",
                "protection.client_privacy hides clients in encrypted sums: set protection.mode: complete, or remove "
                "it",
            )
        if privacy.updates != rules.min_updates or privacy.sums < rules.rounds:
            raise PydanticCustomError(
                "client_privacy",
                "protection.client_privacy is for {sums} sums of at least {updates} updates, and round asks for "
                "{rounds} of {least}: raise sums, or remove sums and updates",
                {
                    "sums": privacy.sums,
                    "updates": privacy.updates,
                    "rounds": rules.rounds,
                    "least": rules.min_updates,
                },
            )
        if privacy.tolerated >= rules.min_updates:
            raise PydanticCustomError(
                "client_privacy",
                "protection.client_privacy.tolerated = {tolerated} of min_updates = {least} updates leaves no noise to "
                "count on: lower it, or raise round.min_updates",
                {"tolerated": privacy.tolerated, "least": rules.min_updates},
            )
        try:
            noise = self.protection.noise
            assert noise is not None
            most = self.cohort_limit or rules.clients
            noise.grid(additive.DEFAULT, min(additive.MAX_CONTRIBUTORS, most))
        except DomainError as error:
            raise PydanticCustomError("client_privacy", "{why}", {"why": error.message}) from None
        return self

    @model_validator(mode="after")
    def _initial_factors_are_secret(self) -> Self:
        strategy = self.protection.strategy
        if self.training.initial_seed and strategy.needs_keys and strategy.shows_factors:
            raise PydanticCustomError(
                "initial_seed",
                "training.initial_seed tells servers the initial factors, which protection.mode {mode} must keep from "
                "them: remove it",
                {"mode": self.protection.mode},
            )
        return self

    @model_validator(mode="after")
    def _a_rule_has_evaluations(self) -> Self:
        if self.round.stop is None:
            return self
        if not self.training.evaluation_examples:
            raise PydanticCustomError(
                "stop",
                "round.stop judges rounds by evaluations, and training.evaluation_examples = 0 asks for none: raise "
                "it, or remove stop",
            )
        if self.protection.client_privacy is not None:
            raise PydanticCustomError(
                "stop",
                "round.stop judges rounds by evaluations, which agents do not report under "
                "protection.client_privacy: remove one of them",
            )
        return self

    @model_validator(mode="after")
    def _floor_has_another_vote(self) -> Self:
        rules = self.round
        if self.protection.coverage_floor and not (rules.replan_every_rounds or rules.replan_below_overlap):
            raise PydanticCustomError(
                "coverage_floor",
                "protection.coverage_floor acts on the next vote, and there is none: set round.replan_every_rounds "
                "or round.replan_below_overlap",
            )
        return self

    @model_validator(mode="after")
    def _rounds_fit_the_strategy(self) -> Self:
        most, rules = self.protection.strategy.most_updates, self.round
        for name in ("min_updates", "target_updates"):
            if 0 < most < getattr(rules, name):
                raise PydanticCustomError(
                    name,
                    "round.{name} = {value} is more than a round of protection.mode {mode} adds up: use at most {most}",
                    {"name": name, "value": getattr(rules, name), "mode": self.protection.mode, "most": most},
                )
        return self

    @property
    def cohort_limit(self) -> int:
        """Most clients that a training round asks; 0 for no limit."""
        limits = (
            ceil(self.round.target_updates * self.round.over_selection),
            self.protection.strategy.most_updates,
        )
        return min((limit for limit in limits if limit), default=0)

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Reads a specification.

        Raises: CONFIGURATION_INVALID: the file cannot be read, is not YAML, or some field is wrong; the message
        has a line for every wrong field, with its dotted path, its value and the remedy.
        """
        content = read_yaml(path)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise invalid(f"{path} is not a valid federation:\n{explain(error, cls)}") from None

    @classmethod
    def from_proto(cls, message: pb.FederationSpec) -> Self:
        """What is absent has its default, or its value in `ABSENT`: a caller need not know every field. A zero that was
        sent is a zero.

        Raises: INVALID_ARGUMENT with a line for every wrong field.
        """
        sent = _sent(message)
        for section, meant in ABSENT.items():
            sent[section] = {**meant, **sent.get(section, {})}
        try:
            return cls.model_validate(sent)
        except ValidationError as error:
            refusal = f"the federation is refused:\n{explain(error, cls)}"
            raise DomainError(Reason.INVALID_ARGUMENT, refusal) from None

    def to_proto(self) -> pb.FederationSpec:
        return pb.FederationSpec(
            name=self.name,
            training=pb.TrainingSpec(**self.training.model_dump()),
            round=pb.RoundSpec(**self.round.model_dump()),
            protection=pb.ProtectionSpec(**self.protection.model_dump()),
            screening=pb.ScreeningSpec(**self.screening.model_dump()),
        )


def _sent(message: Message) -> dict[str, Any]:
    """The fields that a message holds, by name, those of its sections included."""
    return {field.name: _value(value) for field, value in message.ListFields()}


def _value(value: Any) -> Any:  # noqa: ANN401 - as protobuf holds fields
    if isinstance(value, Message):
        return _sent(value)
    return value if isinstance(value, str | int | float) else list(value)
