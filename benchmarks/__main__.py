"""What things cost here, and in other libraries: `python -m benchmarks step|harvest|train|...`."""

import sys
from collections.abc import Sequence

from benchmarks.flags import BENCHES, Benchmark, Curves, Harvest, Index, Step, Train
from benchmarks.harness import Say
from gsae_core.cli.arguments import parse
from gsae_core.cli.main import bench as command
from gsae_core.errors import InputError

MISTAKE = 2


def main(words: Sequence[str], *, program: str = "python -m benchmarks") -> int:
    """Run the benchmark that the words ask for; return 0, or 2 for a mistake, said in a sentence.

    Args:
        program: what the help calls the program.
    """
    try:
        flags = parse(
            words, BENCHES, program=program, kind="benchmark", description=command.__doc__
        )
        print(bench(flags, _say), flush=True)
    except InputError as error:
        _say(" ".join(str(error).split()))
        return MISTAKE
    return 0


def _say(text: str) -> None:
    print(f"gsae_core: {text}", file=sys.stderr, flush=True)


def bench(flags: Benchmark, say: Say) -> str:
    """Measure and return the table, or the JSON, or where the figures are.

    Raises:
        InputError: as the benchmark does.
    """
    match flags:
        case Step():
            from benchmarks.step import bench_step

            return bench_step(flags, say).text(as_json=flags.json)
        case Harvest():
            from benchmarks.harvest import bench_harvest

            return bench_harvest(flags, say).text(as_json=flags.json)
        case Train():
            from benchmarks.train import bench_train

            return bench_train(flags, say).text(as_json=flags.json)
        case Index():
            from benchmarks.index import bench_index

            return bench_index(flags, say).text(as_json=flags.json)
        case Curves():
            from benchmarks.curves import bench_curves

            return "\n".join(f"wrote {path}" for path in bench_curves(flags, say))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
