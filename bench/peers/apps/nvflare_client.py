"""NVFLARE's client: a script that stays through all rounds, and evaluates each mean before it trains on it."""

import nvflare.client as flare
from work import PLAN, Work

KEY = "numpy_key"
"""What NVFLARE calls the one array of a NumPy model."""


def main() -> None:
    """Takes part until the job ends. The round after the last one evaluates alone."""
    flare.init()
    work = Work(flare.get_site_name())
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        done = int(received.current_round)
        work.values = received.params[KEY]
        metrics = {}
        if done:
            count, right = work.evaluate(done)
            metrics = {"accuracy": right / count}
        if done < PLAN["rounds"]:
            work.train(done + 1)
        flare.send(
            flare.FLModel(
                params={KEY: work.values},
                metrics=metrics,
                meta={"NUM_STEPS_CURRENT_ROUND": work.examples},
            )
        )


if __name__ == "__main__":
    main()
