"""Everything an agent computes with its model and data. Synchronous; the agent runs it in its one worker thread."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import torch

from client_agent.adapters import CARD
from client_agent.card import card_of, name_base, rendered
from client_agent.conditions import Conditions
from client_agent.config import AgentConfig
from client_agent.current import CurrentState
from client_agent.drawing import sample, seed_of
from client_agent.evaluation import evaluate
from client_agent.judging import Judge
from client_agent.keys import EpochSecrets
from client_agent.learning import BaseDigest, Evaluation, Origin, Trained, Weights
from client_agent.metrics import timed
from client_agent.outcomes import Outcomes
from client_agent.own_metrics import Metric, metrics_of
from client_agent.plausibility import JUDGING_EXAMPLES
from client_agent.preparation import Prepared, prepare
from client_agent.progress import Activity, Stopped
from client_agent.reporting import Reporting
from client_agent.results import Results
from client_agent.samples import Sampler, as_json
from client_agent.schedule import Schedule
from client_agent.scoring import sensitivity_scores
from client_agent.state import AgentState
from client_agent.tables import first_line
from client_agent.tasks.port import ExampleSet
from client_agent.training import Report, TrainingOutcome, TrainingRun, train
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from shelora.lora.restore import Restored
from shelora.lora.shards import Float64
from shelora.obfuscation import Obfuscation
from shelora.protocol import Stage

if TYPE_CHECKING:
    from client_agent.privacy import Budget

_log = structlog.get_logger(__name__)


class Learner:
    """Model, data and the state they are in. Not thread-safe.

    To use another loop, derive from it and override `fit`; for other data, override `prepare` (docs/own-trainer.md).
    """

    def __init__(self, config: AgentConfig, spec: TrainingSpec, state: AgentState, rounds: int = 1) -> None:
        """Reads the data, loads the model. Raises: DomainError DATA_INVALID, MODEL_INVALID, CONFIGURATION_INVALID.

        Args: rounds: of the federation: a privacy budget must last for them, the learning rate falls over them.
        """
        torch.set_num_threads(config.resources.threads or torch.get_num_threads())
        self._config = config
        self._spec = spec
        self._state = state
        self._schedule = Schedule(spec, rounds)
        self._reporting = Reporting(config.training.report_to, config.state_dir)
        self._conditions = Conditions(config.resources)
        if config.privacy is not None and type(self).fit is not Learner.fit:
            raise DomainError(
                Reason.CONFIGURATION_INVALID,
                "privacy: only the agent's own loop bounds each example's gradient: remove learner, or remove privacy",
            )
        if config.training.keeps_moments and type(self).fit is not Learner.fit:
            raise DomainError(
                Reason.CONFIGURATION_INVALID,
                "training.optimizer_state = keep: only the agent's own loop keeps it: set it to reset",
            )
        prepared = self.prepare(config, spec)
        self.examples, self.test, self.model = prepared.examples, prepared.test, prepared.model
        self.encoder = prepared.encoder
        self._budget = budget_of(config, spec, examples=len(self.examples), rounds=rounds)
        self.privacy = str(self._budget.mechanism) if self._budget else ""
        if self._budget:
            _log.info("privacy_budget", what=str(self._budget))
        for note in self.model.notes:
            _log.warning("model_noted", what=note)
        self.base = self.model.base
        self._card = card_of(
            config,
            spec,
            self.model,
            rounds=rounds,
            protection=str(state.promise() or "not known"),
            privacy=self.privacy,
            counts=(len(self.examples), len(self.test or ())),
        )
        self._current = CurrentState(self.model, state, _identity(config, self.base))
        identity = _training_identity(config, spec, prepared, self.privacy)
        self._outcomes = Outcomes(state, self._current, self._schedule, identity, self._budget)
        # Agents with differential privacy do not judge: an objection reveals something of their examples.
        judge = None if self._budget else Judge(self._loss_with)
        self._results = Results(self.model, state, self._current, self._schedule, judge)
        self._sampler = Sampler(config.samples, self.model, self.encoder)
        self._sampled: str | None = None
        """The position that samples were written from last."""

    def prepare(self, config: AgentConfig, spec: TrainingSpec) -> Prepared:
        """Data and model, read and tried out. Raises: DATA_INVALID, MODEL_INVALID, CONFIGURATION_INVALID."""
        return prepare(config, spec)

    def fit(self, run: TrainingRun, report: Report) -> TrainingOutcome:
        """Trains `self.model` in place, from the weights that it has, on `self.examples`: one round's training.

        No value may move by more than about a learning rate a step, or the update looks like an attack.

        Args:
            run: Rates of the steps, batch size, seed.
            report: Call it with the progress, 0 to 1, before every step; the exception that it raises ends the work.
        """
        told = self._reporting.callbacks(run.steps_before)
        return train(self.model, self.encoder, self.examples, run, report, told)

    def metrics(self) -> Sequence[Metric]:
        """What else evaluations say: the functions of the agent's file. Raises: CONFIGURATION_INVALID."""
        return metrics_of(self._config.metrics)

    @property
    def objection(self) -> str:
        """Why the current state serves this client badly, in words; "" if it does not."""
        return self._current.objection

    def holds(self, round_id: str) -> bool:
        """Makes that round's result current if it was applied before, also before a restart; says whether it was."""
        return self._current.holds(round_id)

    def start(self, secrets: EpochSecrets) -> None:
        """Makes the initial state current."""
        self._current.start(secrets.key_id, initial_values(self._spec, secrets.obfuscation))

    def resume(self, round_id: str, secrets: EpochSecrets) -> None:
        """Makes the last applied result of that round's federation current; the initial state if there is none."""
        if not self._current.resume(round_id):
            self.start(secrets)

    def apply(
        self, round_id: str, parts: Iterable[Restored], obfuscation: Obfuscation, number: int = 0
    ) -> None:
        """Makes the result of a round current, cut to this client's rank, and keeps it.

        Afterwards `objection` says whether the result serves this client badly.

        Args: number: of the training round, to tell how many this client missed; 0 if it is not known.
        Raises: RESULT_REFUSED if it is not plausible beside what this client trained.
        """
        self._results.apply(round_id, parts, initial_values(self._spec, obfuscation), number)

    def _loss_with(self, weights: Weights) -> float:
        """Mean loss on some of this client's own training examples; loads the weights."""
        self.model.load(weights)
        some = self._some(self.examples, min(self._spec.calibration_examples, JUDGING_EXAMPLES), "judging")
        return evaluate(self.model, self.encoder, some, lambda _: None).loss

    def start_of(self, number: int) -> Weights | None:
        """What this client trained in that round from, if it still holds it: the state that results alone lead to.

        Args: number: of the round; 0 for whichever it trained last.
        """
        return self._results.start_of(number)

    def train(self, number: int, activity: Activity, variant: str = "") -> Trained:
        """Trains from the current state, which does not change.

        The outcome is kept: the same round number and variant from the same state, with the same data, is not trained
        twice, neither after a restart nor when a round is attempted again. Another variant has other batches.

        Under differential privacy whatever is trained is spent before it is kept, and the loss is 0.

        Raises: Stopped; DomainError VALUE_NOT_FINITE, PRIVACY_EXHAUSTED.
        """
        return self._outcomes.once(number, variant, lambda: self._train(number, activity, variant))

    def score(self, activity: Activity) -> dict[str, Float64]:
        """Sensitivity of the columns by matrix, on some examples. Raises: Stopped.

        Under differential privacy it follows from the base model's weights alone: examples have no influence on votes.
        """
        if self._budget:
            return self.model.base_weight_sums()
        some = self._some(self.examples, self._spec.calibration_examples, "calibration")
        with timed(Stage.SCORING):
            report = self._reporter(activity, Stage.SCORING)
            return sensitivity_scores(self.model, self.encoder, some, report)

    def evaluate(self, activity: Activity, *, everything: bool = False) -> Evaluation | None:
        """Evaluates the current state on the federation's number of test examples, or on all of them.

        Returns: None if there are no test examples, or the federation wants none evaluated.
        Raises: Stopped.
        """
        if self.test is None:
            return None
        limit = len(self.test) if everything else self._spec.evaluation_examples
        some = self._some(self.test, limit, "evaluation")
        if not len(some):
            return None
        report = self._reporter(activity, Stage.EVALUATING)
        with timed(Stage.EVALUATING):
            return evaluate(self.model, self.encoder, some, report, self.metrics())

    def write_samples(self, number: int, activity: Activity) -> None:
        """Has the current state answer the prompts of the configuration, into a file for that training round.

        Samples are for people to look at: if they cannot be written, the round continues. Raises: Stopped.
        """
        if not self._sampler or self._sampled == self._current.round_id:
            return
        try:
            samples = self._sampler.write(self._reporter(activity, Stage.EVALUATING))
        except (Stopped, DomainError):
            raise
        except Exception as error:  # noqa: BLE001 - a model can make torch raise anything
            _log.warning("samples_not_written", round_number=number, why=first_line(error))
        else:
            path = self._state.save_samples(number, as_json(number, samples))
            _log.info("samples_written", round_number=number, file=str(path))
        self._sampled = self._current.round_id

    def save_adapter(self, folder: Path, made: Origin) -> None:
        """Writes the current state as a PEFT adapter with its card, into an empty folder."""
        self.model.save_adapter(folder)
        name_base(folder, self._spec.base_model)
        (folder / CARD).write_text(self.card(made, None), encoding="utf-8")

    def card(self, made: Origin, measured: Evaluation | None) -> str:
        """The adapter's model card."""
        return rendered(self._card, made, measured)

    def _train(self, number: int, activity: Activity, variant: str) -> Trained:
        run = TrainingRun(
            rates=self._schedule.rates(number, self._spec.steps(len(self.examples))),
            batch_size=self._spec.batch_size,
            seed=seed_of(
                self._config.client_id, number, "training", *_drawn(variant, self._config.training.seed)
            ),
            micro_batch=self._config.resources.micro_batch,
            steps_before=(number - 1) * self._spec.local_steps,
            settings=self._config.training,
        )
        report = self._reporter(activity, Stage.TRAINING)
        with self._current.restored():
            with timed(Stage.TRAINING):
                outcome = self._trained(run, report)
            return Trained(self.model.weights(), outcome.loss, outcome.seconds)

    def _trained(self, run: TrainingRun, report: Report) -> TrainingOutcome:
        if self._budget is None:
            return self.fit(run, report)
        from client_agent.private_training import train_privately  # noqa: PLC0415 - an extra of its own

        mechanism = self._budget.mechanism
        return train_privately(self.model, self.encoder, self.examples, run, mechanism, report)

    def _reporter(self, activity: Activity, stage: Stage) -> Callable[[float], None]:
        return partial(self._conditions.report, activity, stage)

    def _some(self, examples: ExampleSet, count: int, purpose: str) -> ExampleSet:
        """At most that many examples, drawn for this client and purpose: the same ones every time."""
        return examples.select(sample(len(examples), count, seed_of(self._config.client_id, purpose)))


def _drawn(variant: str, seed: int) -> tuple[str, ...]:
    """What else the batches depend on."""
    return (*((variant,) if variant else ()), *((f"seed {seed}",) if seed else ()))


def _identity(config: AgentConfig, base: BaseDigest) -> dict[str, str]:
    """What weights that are kept must agree in."""
    return {
        "federation": config.federation,
        "model": base.hex(),
        "rank": str(config.lora.rank),
        "alpha": repr(config.lora.alpha),
        "rslora": repr(config.lora.rslora),
    }


def _training_identity(
    config: AgentConfig, spec: TrainingSpec, prepared: Prepared, privacy: str
) -> dict[str, str]:
    """What else an outcome of training that is kept must agree in."""
    return {
        "training": spec.model_dump_json(),
        "settings": config.training.model_dump_json(exclude={"report_to"}),
        "precision": str(prepared.model.precision),
        "dropout": repr(config.lora.dropout),
        "data": prepared.examples.fingerprint(),
        "privacy": privacy,
    }


def budget_of(config: AgentConfig, spec: TrainingSpec, *, examples: int, rounds: int) -> "Budget | None":
    """The privacy budget, if the configuration has one. Raises: CONFIGURATION_INVALID."""
    if config.privacy is None:
        return None
    from client_agent.privacy import Budget  # noqa: PLC0415 - an extra of its own

    return Budget(config, spec, examples=examples, rounds=rounds)


def initial_values(spec: TrainingSpec, secret: Obfuscation) -> Obfuscation:
    """Where initial factors come from: the epoch's secret, or what the federation made public to be repeatable."""
    return Obfuscation.public(f"initial/{spec.initial_seed}") if spec.initial_seed else secret
