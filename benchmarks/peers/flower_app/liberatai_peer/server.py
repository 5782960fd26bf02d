"""What the Flower server does: federated averaging over all nodes."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from liberatai_peer.work import Work, first

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; every round's weights are tested."""
    work = Work(str(context.run_config["work"]))
    nodes = int(work.given["devices"])

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"accuracy": work.tested(arrays.to_numpy_ndarrays(), number)})

    strategy = FedAvg(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=nodes - 1, min_available_nodes=nodes - 1
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(first(int(work.given["seed"]))),
        num_rounds=int(work.given["rounds"]),
        evaluate_fn=evaluate,
    )
