"""Benchmarks: contestants take turns, ratios are plain arithmetic, mistakes are sentences."""

import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal
from safetensors.torch import save_file
from tiny_runs import tiny_config

from benchmarks import harvest, train
from benchmarks.flags import BENCHES, Curves, Train
from benchmarks.harness import Entry, Outcome, Result, contest, found, peer_entry
from benchmarks.ours import WAYS, Problem, load_problem, make_problem, measured_l0, save_problem
from benchmarks.step import DENSE_MATRICES, OURS, per_sae
from benchmarks.table import Table, machine_facts, machine_line, processor, rows_of
from gsae_core.cli import main
from gsae_core.cli.arguments import parse
from gsae_core.config import EvalConfig

# Speaks the protocol with times it was given; says in a file when it is its turn.
FAKE = """
import json, sys
job = json.loads(sys.argv[1])
times = iter(job["times"])
print(json.dumps({"ready": True, "torch": "fake"}), flush=True)
for line in sys.stdin:
    word = line.strip()
    with open(job["log"], "a") as log:
        log.write(job["name"] + " " + word + "\\n")
    answer = {"weigh": {"temporary": 7}, "look": {"resident": 9, "l0": 2.0}}.get(word)
    if word == "go":
        ms = next(times, None)
        if ms is None:
            sys.exit("it is\\nall too much")
        answer = {"ms": ms}
    print(json.dumps(answer), flush=True)
"""


def fake(folder: Path, name: str, times: list[float], *, ours: bool = False) -> Entry:
    script = folder / "fake.py"
    script.write_text(FAKE)
    job = {"name": name, "times": times, "log": str(folder / "log"), "threads": 1}
    return Entry(name, (sys.executable, str(script)), job, ours=ours)


def silent(_: str) -> None:
    pass


def held(entries: list[Entry], **options: Any) -> Outcome:
    return contest(entries, **{"rounds": 3, "warm_up": 1, "say": silent} | options)


def result(name: str, *ms: float, temporary: int | None = None, **facts: Any) -> Result:
    return Result(name, tuple(map(float, ms)), temporary, None, facts)


# Contests.


def test_contestants_take_turns_and_the_warm_up_does_not_count(tmp_path: Path) -> None:
    entries = [fake(tmp_path, "a", [99, 4, 2, 3]), fake(tmp_path, "b", [98, 10, 30, 20])]
    outcome = held(entries)
    assert outcome.notes == ()
    assert [(r.name, r.rounds, r.ms) for r in outcome.results] == [
        ("a", (4, 2, 3), 3),
        ("b", (10, 30, 20), 20),
    ]
    assert (tmp_path / "log").read_text().splitlines() == [
        *["a go", "b go"] * 4,
        *["a weigh", "b weigh", "a look", "b look"],
    ]


def test_what_a_contestant_says_of_itself_goes_beside_its_times(tmp_path: Path) -> None:
    (only,) = held([fake(tmp_path, "a", [1, 1, 1, 1])]).results
    assert (only.temporary, only.resident) == (7, 9)
    assert only.facts == {"torch": "fake", "l0": 2.0}


def test_memory_is_not_asked_for_where_a_round_is_too_dear(tmp_path: Path) -> None:
    (only,) = held([fake(tmp_path, "a", [5])], rounds=1, warm_up=0, weigh=False).results
    assert (only.rounds, only.temporary) == ((5,), None)
    assert "a weigh" not in (tmp_path / "log").read_text()


def test_a_peer_that_fails_drops_out_with_its_last_words(tmp_path: Path) -> None:
    outcome = held([fake(tmp_path, "a", [1, 1]), fake(tmp_path, "b", [1, 2, 3, 4])])
    assert [r.name for r in outcome.results] == ["b"]
    assert outcome.notes == ("a dropped out: all too much",)


def test_a_way_of_ours_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^a: all too much$"):
        held([fake(tmp_path, "a", [], ours=True)])


def test_a_way_of_ours_that_runs_out_of_memory_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "full.py").write_text("raise MemoryError('cannot allocate memory')")
    entry = Entry(
        "our step", (sys.executable, str(tmp_path / "full.py")), {"threads": 1}, ours=True
    )
    assert refusal(held, [entry]) == (
        "expected more memory than there is for our step (MemoryError: cannot allocate memory); "
        "lower the batch or the width"
    )


def test_a_process_that_was_killed_says_so(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text("import os; os.kill(os.getpid(), 9)")
    entry = Entry("a", (sys.executable, str(tmp_path / "killed.py")), {"threads": 1}, ours=False)
    assert held([entry]).notes == (
        "a dropped out: killed by the system, as happens when memory runs out",
    )


SERVED = """
import torch
from benchmarks.serve import Work, serve

def prepare(job):
    print("a library says hello")
    kept = []

    def run():
        kept.append(torch.ones(20_000_000))
        kept.append(torch.ones(20_000_000))
        del kept[1]
        return {"threads": torch.get_num_threads()}

    return Work(run, kept.clear, lambda: {"version": "1"})

serve(prepare)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="the kernel's high-water mark is Linux's")
def test_a_served_work_is_weighed_by_what_it_holds_at_once(tmp_path: Path) -> None:
    script = tmp_path / "served.py"
    script.write_text(SERVED)
    job = {"threads": 1, "device": "cpu"}
    entry = Entry("a", (sys.executable, str(script)), job, ours=False)
    (only,) = held([entry], rounds=1, warm_up=0).results
    assert only.facts["threads"] == 1
    assert (only.facts["torch"], only.facts["version"]) == (torch.__version__, "1")
    # Two tensors of 80 MB at once; those of the round before were given back first.
    assert only.temporary == pytest.approx(160e6, rel=0.05)
    assert only.temporary is not None
    assert only.resident is not None
    assert only.resident > only.temporary


# The problem, and our ways of solving it.


def test_a_problem_is_held_at_the_l0_asked_for() -> None:
    problem = make_problem(batch=40, d_in=6, d_sae=24, l0=2.5)
    # 2.5 open gates in each of 40 rows are the 100 largest of 960.
    assert measured_l0(problem.x, problem.W_dec.T, problem.bias) == 2.5
    torch.testing.assert_close(problem.W_dec.norm(dim=1), torch.ones(24))


def test_a_problem_may_ask_for_next_to_nothing_and_next_to_all() -> None:
    for l0, n_open in ((0.001, 1), (23.999, 959)):
        problem = make_problem(batch=40, d_in=6, d_sae=24, l0=l0)
        l0_found = measured_l0(problem.x, problem.W_dec.T, problem.bias)
        assert l0_found == pytest.approx(n_open / 40)


@pytest.fixture
def step_job(tmp_path: Path) -> dict[str, Any]:
    problem = make_problem(batch=40, d_in=6, d_sae=24, l0=2.0)
    save_problem(problem, tmp_path / "problem.safetensors")
    path = str(tmp_path / "problem.safetensors")
    return {"problem": path, "device": "cpu", "threads": 1, "saes": 1}


def test_a_problem_is_read_as_it_was_written(step_job: dict[str, Any]) -> None:
    again = load_problem(step_job["problem"], "cpu")
    written = make_problem(batch=40, d_in=6, d_sae=24, l0=2.0)
    assert isinstance(again, Problem)
    assert all(torch.equal(a, b) for a, b in zip(again, written, strict=True))


@pytest.mark.parametrize("way", ["whole step", "sparse", "dense by hand", "autograd"])
def test_steps_leave_l0_where_it_is(way: str, step_job: dict[str, Any]) -> None:
    work = WAYS[way](step_job)
    for _ in range(5):
        work.run()
    work.tidy()
    assert work.look() == {"l0": 2.0}


@pytest.mark.parametrize(
    ("settings", "l0"),
    [
        ({"screened": True}, 2.0),
        ({"architecture": "jumprelu"}, 2.0),
        ({"architecture": "topk", "l0": 2.0}, 2.0),
        ({"half": True}, 12.0),
    ],
)
def test_other_settings_hold_their_l0_too(
    settings: dict[str, Any], l0: float, step_job: dict[str, Any]
) -> None:
    work = WAYS["whole step"](step_job | settings)
    for _ in range(3):
        work.run()
    assert work.look()["l0"] == pytest.approx(l0, abs=1)


def test_curves_measure_what_they_draw_and_no_variants() -> None:
    points = [step for steps in Curves().steps().values() for step in steps]
    assert all(step.brief for step in points)


def test_several_saes_learn_at_once(step_job: dict[str, Any]) -> None:
    work = WAYS["whole step"](step_job | {"saes": 3})
    work.run()
    assert work.look() == {"l0": 2.0}


def test_the_time_of_a_sweep_is_told_for_each_sae() -> None:
    assert per_sae(result(OURS, 30, 60), 3).rounds == (10, 20)
    assert per_sae(result("SAELens", 30, 60), 3).rounds == (30, 60)


def test_every_way_of_reading_reads(tiny_lm_folder: Path, tmp_path: Path) -> None:
    save_file({"ids": torch.arange(2, 34).reshape(4, 8)}, tmp_path / "ids")
    job = {
        "tokens_file": str(tmp_path / "ids"),
        "device": "cpu",
        "model": str(tiny_lm_folder),
        "layer": 0,
        "rows": 2,
        "batch": 16,
    }
    two = {"beside": ["mlp_out"]}
    ways = [("bare", {}), ("harvest", {}), ("stream", {}), ("harvest", two), ("stream", two)]
    for way, more in ways:
        work = WAYS[way](job | more)
        for _ in range(2):
            assert work.run() is None


def test_a_whole_run_tells_the_l0_it_ended_with(tiny_lm_folder: Path, words: Path) -> None:
    config = tiny_config(tiny_lm_folder, words, evaluation=EvalConfig(n_tokens=1))
    found = WAYS["train"]({"config": config.model_dump_json()}).run()
    assert found is not None
    assert 0 <= found["l0"] <= 24


def test_a_sweeps_lambdas_lie_a_factor_4_apart_around_the_single_one() -> None:
    flags = Train(sparsity=0.2, width=8, tokens=64, batch=16)
    single, three = (train.run_config(flags, n_saes=n).saes for n in (1, 3))
    assert [spec.sparsity for spec in single] == [0.2]
    assert [spec.sparsity for spec in three] == pytest.approx([0.1, 0.2, 0.4])
    assert {spec.d_sae for spec in three} == {8}


# Tables.


def table() -> Table:
    results = (result("unit", 8, 10, 12), result("slow", 20, 25, 99, temporary=4_000_000, l0=3.0))
    return Table(
        title="A title",
        settings={"batch": 4},
        unit="unit",
        rows=rows_of(results, unit="unit", n_tokens=50),
        notes=("a note",),
        machine=machine_facts(threads=2, device="cpu"),
    )


def test_ratios_are_of_medians_to_the_units_and_speed_is_tokens_over_time() -> None:
    unit, slow = table().rows
    assert (unit.ratio, slow.ratio) == (1.0, 2.5)
    # 50 tokens in 10 ms and in 25 ms.
    assert (unit.cells["tokens/s"], slow.cells["tokens/s"]) == ("5,000", "2,000")
    assert slow.cells["temporary memory"] == "4.0 MB"


def test_a_table_says_what_was_measured_where() -> None:
    lines = table().lines()
    assert lines[0] == "A title"
    # Without its build: what pip calls 2.13.0 may call itself 2.13.0+cu130.
    assert f"torch {torch.__version__.partition('+')[0]}" in lines[1]
    assert lines[3].split() == ["time", "ratio", "tokens/s", "L0", "temporary", "memory"]
    assert lines[4].split() == ["unit", "10", "ms", "1.00x", "5,000", "–", "–"]
    assert lines[5].split() == ["slow", "25", "ms", "2.50x", "2,000", "3.0", "4.0", "MB"]
    assert lines[-1] == "a note"


def test_json_holds_every_round() -> None:
    read = json.loads(table().text(as_json=True))
    assert read["unit"] == "unit"
    assert read["rows"][1]["rounds_ms"] == [20, 25, 99]
    assert read["rows"][1]["l0"] == 3.0
    assert read["rows"][0]["temporary_bytes"] is None


def test_the_processor_is_the_one_of_the_systems_list(tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nmodel name\t: Frobnicator 9000\n")
    assert processor(listing) == "Frobnicator 9000"
    assert processor(tmp_path / "none") != "Frobnicator 9000"
    assert "\n" not in processor()


def test_the_machine_is_told_without_its_name() -> None:
    known = {"processor", "device", "gpus", "threads", "system", "python"}
    libraries = {"torch", "transformers", "transformer-lens"}
    assert set(machine_facts(threads=2, device="cpu")) == known | libraries
    facts = machine_facts(threads=2, device="cpu") | {"gpus": ["Some Card"], "processor": "x"}
    assert machine_line(facts).startswith("Some Card, 2 threads, ")


def test_harvests_are_compared_by_throughput_and_memory() -> None:
    results = {
        harvest.BARE: result(harvest.BARE, 90),
        harvest.OURS: result(harvest.OURS, 100, temporary=30),
        harvest.BRIDGE: result(harvest.BRIDGE, 250, temporary=60),
    }
    assert harvest.comparisons(results) == [
        "our harvest: 0.90x the throughput of the bare model",
        "our harvest: 2.50x the throughput of TransformerLens, in 0.50x its temporary memory",
    ]
    del results[harvest.BRIDGE]
    assert len(harvest.comparisons(results)) == 1
    results[harvest.TWO] = result(harvest.TWO, 105)
    assert harvest.comparisons(results)[1:] == [
        "our harvest of two sites: 1.05x the time of one site"
    ]


def test_eight_runs_of_a_peer_are_eight_times_the_one_measured() -> None:
    results = {
        train.OURS: result(train.OURS, 10),
        train.sweep_name(8): result(train.sweep_name(8), 32),
        train.SAELENS: result(train.SAELENS, 45),
    }
    # 45 / 10, and 8 x 45 / 32.
    assert train.comparisons(results, 8) == [
        "SAELens' runner takes 4.50x as long as our run",
        "8 SAELens runs, counted as 8 times the one measured, take 11.25x as long as our sweep "
        "of 8",
    ]
    del results[train.SAELENS]
    assert train.comparisons(results, 8) == []


# Peers.


def make_environment(folder: Path, peer: str) -> None:
    (folder / peer / "bin").mkdir(parents=True)
    (folder / peer / "bin" / "python").touch()


def test_a_missing_peer_is_a_line_on_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.harness.FOLDER", tmp_path)
    both = ("saelens", "dictionary_learning")
    advice = "not measured: no environment here; make it with benchmarks/peers.sh"
    assert found(None, both) == ([], [f"SAELens and dictionary_learning {advice}"])
    make_environment(tmp_path, "saelens")
    assert found(None, both) == (["saelens"], [f"dictionary_learning {advice}"])
    make_environment(tmp_path, "dictionary_learning")
    assert found(None, both) == (list(both), [])


def test_a_folder_that_was_named_and_holds_no_peer_is_a_mistake(tmp_path: Path) -> None:
    assert refusal(found, tmp_path, ("saelens",)) == (
        "--peers: expected a folder made by benchmarks/peers.sh, found none of saelens in "
        f"{tmp_path}; make it with benchmarks/peers.sh {tmp_path}"
    )


@pytest.mark.parametrize(
    "script", ["saelens_step.py", "dictionary_learning_step.py", "saelens_train.py"]
)
def test_the_scripts_of_the_peers_are_where_they_are_looked_for(
    script: str, tmp_path: Path
) -> None:
    entry = peer_entry("SAELens", "saelens", script, {}, folder=tmp_path)
    assert entry.command[0] == str(tmp_path / "saelens" / "bin" / "python")
    assert Path(entry.command[1]).is_file()


# Flags.


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("bench", "expected a benchmark, one of step, harvest, train, index, curves, got none"),
        (
            "bench speed",
            "expected a benchmark, one of step, harvest, train, index, curves, got 'speed'",
        ),
        ("bench step --batc 3", "expected a flag of bench step, got '--batc'; did you mean --b"),
        ("bench step 3", "expected a flag of bench step, got '3'"),
        ("bench step --batch two", "--batch: expected a whole number, got 'two'"),
        ("bench step --batch 0", "--batch: expected a number of at least 1, got 0"),
        ("bench step --d-sae 0", "--d-sae: expected a number of at least 1, got 0"),
        ("bench step --threads 0", "--threads: expected a number of at least 1, got 0"),
        (
            "bench step --d-sae 64 --l0 64",
            "--l0: expected a number above 0 and below --d-sae (64), got 64",
        ),
        ("bench step --device tpu", "--device: expected one of cpu, cuda, got 'tpu'"),
        ("bench harvest --rows 0", "--rows: expected a number of at least 1, got 0"),
        ("bench harvest --layer 4", "expected a layer from 0 to 3, got 4 (bundled has 4 layers)"),
        ("bench train --saes 0", "--saes: expected a number of at least 1, got 0"),
        (
            "bench train --tokens 9 --batch 10",
            "--tokens: expected at least one batch (10), got 9",
        ),
        ("bench train --sparsity 0", "--sparsity: expected a number above 0, got 0"),
        ("bench curves --saes 0", "--saes: expected a number of at least 1, got 0"),
        ("bench curves --l0 1 x", "--l0: expected numbers, got '1 x'"),
        ("bench curves --folder nowhere", "--folder: expected a folder, found none at nowhere"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(shlex.split(words)) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "step", "--device", "cuda"]) == 2
    assert "expected a device of this machine (auto, cpu" in capsys.readouterr().err


@pytest.mark.parametrize("name", BENCHES)
def test_every_benchmark_has_help_and_sound_defaults(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parse([name], BENCHES).check()
    with pytest.raises(SystemExit) as stop:
        main.main(["bench", name, "--help"])
    assert stop.value.code == 0
    assert f"usage: python -m gsae_core bench {name}" in capsys.readouterr().out


# From end to end.


@pytest.mark.slow
def test_bench_step_prints_json_in_which_every_way_holds_the_l0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "bench step --batch 64 --d-in 8 --d-sae 32 --l0 4 --rounds 2 --no-peers --json"
    assert main.main(shlex.split(words)) == 0
    read = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in read["rows"]}
    assert rows["encoder product"]["ratio"] == 1.0
    half = {name for name in rows if "half the latents active" in name}
    assert [rows[name]["l0"] for name in half] == [pytest.approx(16, abs=1)] * 2
    # In z - theta instead of z, rounding may shut the gates that are the closest to it.
    others = [row["l0"] for name, row in rows.items() if name not in {*half, "encoder product"}]
    assert others == [pytest.approx(4.0, abs=2 / 64)] * len(others)
    assert {"our step, screened encode", "our step, JumpReLU", "our step, TopK"} <= rows.keys()
    assert all(len(row["rounds_ms"]) == 2 for row in rows.values())


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_and_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A dense step of 64 x 32 float32 values takes DENSE_MATRICES x 8192 bytes; 60 % is too little.
    monkeypatch.setattr("benchmarks.step.free_memory", lambda _: 8192 * DENSE_MATRICES)
    words = "bench step --batch 64 --d-in 8 --d-sae 32 --l0 4 --rounds 1"
    assert main.main(shlex.split(words)) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "autograd and the peers not measured: each takes about 114.7 kB"
    assert "SAELens" not in out
