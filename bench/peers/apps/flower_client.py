"""Flower's ClientApp: what a SuperNode starts for each message."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from work import Work

app = ClientApp()


def _ready(message: Message, context: Context) -> tuple[Work, int]:
    """The client with the values of the message, and the round."""
    work = Work(str(context.node_config["name"]))
    work.values = message.content["arrays"].to_numpy_ndarrays()[0]
    return work, int(message.content["config"]["server-round"])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains a round."""
    work, number = _ready(message, context)
    metrics = {"loss": work.train(number), "num-examples": work.examples}
    content = {"arrays": ArrayRecord([work.values]), "metrics": MetricRecord(metrics)}
    return Message(content=RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates a round's mean."""
    work, number = _ready(message, context)
    count, right = work.evaluate(number)
    metrics = {"accuracy": right / count, "num-examples": count}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
