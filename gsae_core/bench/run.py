"""The benchmark that a command line asks for -> the text to print."""

from gsae_core.bench.contestants import Say
from gsae_core.bench.flags import Benchmark, Curves, Harvest, Index, Step, Train


def bench(flags: Benchmark, say: Say) -> str:
    """Measure and return the table, or the JSON, or where the figures are.

    Raises:
        InputError: as the benchmark does.
    """
    match flags:
        case Step():
            from gsae_core.bench.step import bench_step

            return bench_step(flags, say).text(as_json=flags.json)
        case Harvest():
            from gsae_core.bench.harvest import bench_harvest

            return bench_harvest(flags, say).text(as_json=flags.json)
        case Train():
            from gsae_core.bench.train import bench_train

            return bench_train(flags, say).text(as_json=flags.json)
        case Index():
            from gsae_core.bench.index import bench_index

            return bench_index(flags, say).text(as_json=flags.json)
        case Curves():
            from gsae_core.bench.curves import bench_curves

            return "\n".join(f"wrote {path}" for path in bench_curves(flags, say))
