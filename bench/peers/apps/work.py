"""A client's work, whoever carries its messages: MiniLM with LoRA, trained and evaluated as the demo's agents do.

Runs where a peer is installed, beside torch, transformers and peft; nothing of ours is imported. What it does is in
the JSON file that `PEERS_WORK` names (`bench.peers.plan.Plan`). `python work.py` writes the values that all start from.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

PLAN: Final[dict[str, Any]] = json.loads(Path(os.environ["PEERS_WORK"]).read_text(encoding="utf-8"))
EVALUATED_AT_ONCE: Final = 32
BATCH_SEEDS: Final = 1_000

Examples = list[tuple[str, int]]


class Work:
    """One client: its model and its data. An empty name has a model alone."""

    def __init__(self, name: str) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._name = name
        self._tokenizer = AutoTokenizer.from_pretrained(PLAN["model"])
        base = AutoModelForSequenceClassification.from_pretrained(
            PLAN["model"], num_labels=len(PLAN["labels"])
        )
        lora = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=PLAN["rank"],
            lora_alpha=PLAN["alpha"],
            target_modules=PLAN["target_modules"],
        )
        self._model = get_peft_model(base, lora)
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._examples = {part: self._read(part) for part in ("train", "test")} if name else {}

    @property
    def values(self) -> NDArray[np.float32]:
        """All that is trained, as one vector."""
        with torch.no_grad():
            return torch.cat([p.reshape(-1) for p in self._trained]).numpy()

    @values.setter
    def values(self, vector: NDArray[np.float32]) -> None:
        with torch.no_grad():
            parts = torch.from_numpy(np.array(vector)).split([p.numel() for p in self._trained])
            for parameter, part in zip(self._trained, parts, strict=True):
                parameter.copy_(part.view_as(parameter))

    @property
    def examples(self) -> int:
        """How many it trains on."""
        return len(self._examples["train"])

    def train(self, number: int) -> float:
        """A round's steps, from 1. Returns the mean loss."""
        began, losses = time.time(), []
        rates = PLAN["rates"][number - 1]
        optimizer = torch.optim.AdamW(self._trained, lr=rates[0], weight_decay=0.0)
        rng = np.random.default_rng([BATCH_SEEDS, number])
        train = self._examples["train"]
        self._model.train()
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            chosen = rng.choice(len(train), PLAN["batch_size"], replace=False)
            loss = self._model(**self._encoded([train[i] for i in chosen])).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
            optimizer.step()
            losses.append(float(loss.item()))
        self._model.eval()
        self._note(training=number, began=began, ended=time.time())
        return sum(losses) / len(losses)

    def evaluate(self, number: int) -> tuple[int, int]:
        """After a round: examples looked at, all of them after the last; and how many were right."""
        limit = None if number == PLAN["rounds"] else PLAN["evaluation_examples"]
        began, test = time.time(), self._examples["test"][:limit]
        right = 0
        self._model.eval()
        with torch.inference_mode():
            for start in range(0, len(test), EVALUATED_AT_ONCE):
                batch = self._encoded(test[start : start + EVALUATED_AT_ONCE])
                right += int((self._model(**batch).logits.argmax(1) == batch["labels"]).sum())
        self._note(evaluating=number, began=began, ended=time.time(), count=len(test), right=right)
        return len(test), right

    def _read(self, part: str) -> Examples:
        path = Path(PLAN["data"]) / self._name / f"{part}.jsonl"
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return [(row["text"], PLAN["labels"].index(row["label"])) for row in rows]

    def _encoded(self, examples: Examples) -> dict[str, torch.Tensor]:
        texts = [text for text, _ in examples]
        batch = self._tokenizer(
            texts, truncation=True, max_length=PLAN["max_tokens"], padding=True, return_tensors="pt"
        )
        return {**batch, "labels": torch.tensor([label for _, label in examples])}

    def _note(self, **what: float) -> None:
        with (Path(PLAN["notes"]) / f"{self._name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    np.save(PLAN["initial"], Work("").values)
