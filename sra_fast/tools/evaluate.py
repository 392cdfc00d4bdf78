"""`sra-fast evaluate`: from a run to a report on its samples."""

from __future__ import annotations

from sra_fast.config import Config, EvaluateCommand
from sra_fast.data.source import open_source
from sra_fast.evaluation import evaluate as evaluation
from sra_fast.progress import Progress
from sra_fast.tools.weights import device_of, load_network


def evaluate(command: EvaluateCommand, run: Config) -> evaluation.Report:
    """Compare samples from the weights of a run with its real images.

    Args:
        run: the run's configuration.
    """
    weights, network = load_network(command.weights, command.weights_key, command.device)
    source, _ = open_source(run, device_of(network))
    with Progress(2 * command.evaluate.samples, "evaluating") as bar:
        return evaluation.evaluate(
            network,
            source.pixels(source.train),
            source.pixels(source.held_out),
            model=weights.config,
            path=run.objective.path,
            sample=command.sample,
            config=command.evaluate,
            progress=bar.update,
        )
