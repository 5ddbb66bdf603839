"""Your own training loop: an agent's file names it with `learner: examples.own_trainer.loop:PlainLoop`."""

import time

import torch

from client_agent.drawing import batches
from client_agent.learner import Learner
from client_agent.training import Report, TrainingOutcome, TrainingRun


class PlainLoop(Learner):
    """What every tutorial writes: data, model, sums and adapters stay the agent's."""

    def fit(self, run: TrainingRun, report: Report) -> TrainingOutcome:
        """Trains on the federation's batches, at its rates."""
        started, losses = time.monotonic(), []
        optimizer = torch.optim.AdamW(self.model.trainable(), lr=1.0, weight_decay=0.0)
        torch.manual_seed(run.seed)
        self.model.module.train()
        try:
            for step, chosen in enumerate(batches(len(self.examples), run.batch_size, run.steps, run.seed)):
                report(step / run.steps)
                optimizer.param_groups[0]["lr"] = run.rates[step]
                logits, targets = self.model.predict(self.encoder.batch(self.examples.select(chosen)))
                loss = torch.nn.functional.cross_entropy(logits, targets)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                torch.nn.utils.clip_grad_norm_(self.model.trainable(), 1.0)
                optimizer.step()
                losses.append(float(loss.item()))
        finally:
            self.model.module.eval()
        return TrainingOutcome(sum(losses) / len(losses), time.monotonic() - started)
