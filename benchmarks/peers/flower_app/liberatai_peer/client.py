"""What a Flower client does: train for a round."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from liberatai_peer.work import Work

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the samples of this node."""
    work = Work(str(context.run_config["work"]))
    number = int(message.content["config"]["server-round"])
    weights = message.content["arrays"].to_numpy_ndarrays()
    found, samples, seconds = work.trained(weights, int(context.node_config["partition-id"]), number)
    told = MetricRecord({"num-examples": samples, "seconds": seconds})
    content = RecordDict({"arrays": ArrayRecord(found), "metrics": told})
    return Message(content=content, reply_to=message)
