"""The trainer over several processes, started by torchrun: the run of one, whoever dies on the way."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from PIL import Image
from test_train import TINY, run

from moco_fast import cli
from moco_fast.evaluate.probe import KnnProbe
from moco_fast.train import checkpoint
from moco_fast.train.display import Display

SECONDS = 240  # after which a run has hung
# Statistics of four devices, however many processes there are. At this learning rate a rounding error stays
# one, unless it takes an activation across zero, which moves later losses by up to ROUNDED. At the rate
# of the preset, 60 times this, some instruction sets make 2e-4 of it in ten steps.
RECIPE = replace(TINY, bn_splits=4, verify_every=2, lr=0.001)
ROUNDED = 1e-4


def options(config=RECIPE):
    """The recipe for the command line, where it differs from the preset of the digits."""
    values = {
        "preset": "digits", "epochs": config.epochs, "batch-size": config.batch_size, "width": config.width,
        "dim": config.dim, "queue-size": config.queue_size, "bn-splits": config.bn_splits,
        "log-every": 1, "checkpoint-every": config.checkpoint_every, "knn-every": config.knn_every,
        "knn-bank": config.knn_bank, "knn-queries": config.knn_queries, "threads": 1, "warmup-epochs": 0.0,
        "verify-every": config.verify_every, "lr-batch-size": config.lr_batch_size, "lr": config.lr,
    }  # fmt: skip
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def torchrun(world, folder, *more, restarts=0, program=("-m", "moco_fast.cli", "pretrain"), flag="--out"):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
        f"--max-restarts={restarts}", *program, *more, flag, str(folder),
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "GOMP_SPINCOUNT": "2000", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def finish(process, status=0):
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert status is None or process.returncode == status, output
    return output


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """By number of processes."""
    folders = {}
    for world in (1, 2):
        folders[world] = tmp_path_factory.mktemp("undisturbed") / "run"
        output = finish(torchrun(world, folders[world], *options()))
        assert output.count("Run folder:") == 1  # rank 0 alone speaks
    return folders


def assert_equal_losses(got, want, rtol):
    assert got.keys() == want.keys()
    for step, loss in want.items():
        assert got[step] == pytest.approx(loss, rel=rtol), step


def assert_equal_states(folder, other):
    """Bit for bit, but for the statistics, which every checkpoint averages over processes once more."""
    a, b = (checkpoint.read(path)["state_dict"] for path in (folder, other))
    for name, value in a.items():
        if "running" in name:
            torch.testing.assert_close(value, b[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, b[name]), name


def test_two_processes_train_as_one(undisturbed):
    one, two = (losses(undisturbed[world]) for world in (1, 2))
    assert_equal_losses(two, one, ROUNDED)
    states = [checkpoint.read(undisturbed[world]) for world in (1, 2)]
    for name, value in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][name], value, rtol=1e-3, atol=1e-5)
    assert states[0]["moco_fast"]["accuracy"] == pytest.approx(states[1]["moco_fast"]["accuracy"], abs=0.02)


LEFT = """
import sys
sys.path.insert(0, sys.argv[-1])
import ranks, torch
from torch.nn.parallel import DistributedDataParallel
from moco_fast import distributed
from moco_fast.train import processes
def train():
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    model.cycle = [model]
    distributed.from_all(ranks.gloo_threads()[0])
with processes.joined("cpu"):
    train()
ranks.assert_no_gloo_threads()
"""


def test_processes_leave_with_no_thread_that_python_could_abort_for(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(LEFT)
    finish(torchrun(2, Path(__file__).parent, program=(str(program),), flag="--tests"))


# Ended by SIGTERM, on all processes, after step 3.
STOPPED = """
import os, signal, sys, time
from moco_fast import cli
from moco_fast.train.display import Display
advance = Display.advance
def advance_and_stop(self, step):
    advance(self, step)
    if step == 3 and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
        while not signal.getsignal(signal.SIGTERM).__self__.signal:
            time.sleep(0.01)
Display.advance = advance_and_stop
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 4)])
def test_resume_on_as_many_processes_or_others(undisturbed, tmp_path, before, after):
    program = tmp_path / "stopped.py"
    program.write_text(STOPPED)
    finish(torchrun(before, tmp_path / "run", *options(), program=(str(program),)), status=None)
    saved = checkpoint.read(tmp_path / "run")["moco_fast"]["step"]
    assert 3 <= saved < 10
    finish(torchrun(after, tmp_path / "run", flag="--resume"))
    same = before == after == 2
    assert_equal_losses(losses(tmp_path / "run"), losses(undisturbed[2]), 0 if same else ROUNDED)
    if same:
        assert_equal_states(tmp_path / "run", undisturbed[2])


# Kills rank 1 of the first attempt, which finds no mark of one before it, in the middle of step 5.
KILLER = """
import os, pathlib, signal, sys, time
from moco_fast import cli
from moco_fast.train.display import Display
mark = pathlib.Path(__file__).with_name("died")
first = not mark.exists()
advance = Display.advance
def advance_and_die(self, step):
    global died
    advance(self, step)
    if step == 5 and first:
        died = time.monotonic()
        if os.environ["RANK"] == "1":
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
Display.advance = advance_and_die
status = cli.main(["pretrain", *sys.argv[1:]])
if first:
    print("survived for", time.monotonic() - died, "s")
sys.exit(status)
"""


def test_a_killed_rank_is_named_and_the_run_goes_on(undisturbed, tmp_path):
    program = tmp_path / "killer.py"
    program.write_text(KILLER)
    output = finish(torchrun(2, tmp_path / "run", *options(), restarts=1, program=(str(program),)))
    assert "rank 1 died or stopped answering; this was rank 0 of 2" in output, output
    assert float(re.search(r"survived for ([\d.]+) s", output).group(1)) < 60
    assert_equal_losses(losses(tmp_path / "run"), losses(undisturbed[2]), 0)
    assert_equal_states(tmp_path / "run", undisturbed[2])


def test_a_restart_refuses_what_the_start_refused(undisturbed):
    """The same command on the folder of an earlier launch: torchrun takes the refusal for a crash."""
    folder = undisturbed[1]
    before = (folder / "checkpoint.pth").read_bytes(), (folder / "config.json").read_bytes()
    output = finish(torchrun(1, folder, *options(), restarts=1), status=1)
    assert output.count("is not empty: resume it") == 2, output
    assert before == ((folder / "checkpoint.pth").read_bytes(), (folder / "config.json").read_bytes())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 252, "bn_splits": 1}, "batch_size=252 must be a multiple of 8"),
        ({"bn_splits": 2}, "bn_splits=2 must be 1 or a multiple of the 8 processes"),
        ({"sync_bn": True, "bn_splits": 1}, "sync_bn needs GPUs"),
    ],
)
def test_what_cannot_be_shared_out(tmp_path, monkeypatch, changes, message):
    from moco_fast import distributed
    from moco_fast.train import build

    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    with pytest.raises(ValueError, match=message):
        build.check_processes(replace(RECIPE, **changes), torch.device("cpu"))


def test_restarts_need_a_folder(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert cli.main(["pretrain", "--preset", "digits"]) == 1
    assert "out must be given where torchrun may restart a run" in capsys.readouterr().err


def test_parts_of_a_batch_are_the_batch(tmp_path, monkeypatch):
    """Two parts have the statistics of two devices; but for the shuffle, which each has no use for."""

    def in_order(devices, rows, generator):
        return torch.arange(devices * rows)

    monkeypatch.setattr("moco_fast.distributed.shuffle.balanced_order", in_order)
    run(tmp_path / "whole", replace(RECIPE, bn_splits=2))
    run(tmp_path / "parts", replace(RECIPE, bn_splits=1, accumulation=2))
    first = [dict(list(losses(tmp_path / name).items())[:5]) for name in ("parts", "whole")]
    assert_equal_losses(*first, 1e-4)  # later steps amplify what rounding did to the first


def test_sigterm_spares_the_workers_that_decode(tmp_path, monkeypatch):
    """torchrun signals whole groups of processes: the checkpoint must not be lost with the decoders."""
    monkeypatch.setattr("moco_fast.data.folder.MEMORY_BUDGET", 0)
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(40):
            pixels = torch.randint(0, 255, (500, 500, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{i}.jpg")
    config = replace(
        TINY, data=str(tmp_path / "photos"), batch_size=8, queue_size=16, epochs=30, workers=1, bn_splits=1
    )
    advance = Display.advance

    def advance_and_signal(self, step):
        advance(self, step)
        if step == 2:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGTERM)
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Display, "advance", advance_and_signal)
    assert run(tmp_path / "run", config).interrupted == signal.SIGTERM
    assert checkpoint.read(tmp_path / "run")["moco_fast"]["step"] == 8


def rank_with_its_own_folder(rank, folder):
    """As on machines whose disks are their own."""
    os.chdir(folder / f"machine{rank}")
    try:
        run(Path("run"), RECIPE, resume=True)
    except RuntimeError as error:
        return str(error)


def test_processes_that_read_other_checkpoints_are_told(undisturbed, tmp_path):
    for rank in range(2):
        shutil.copytree(undisturbed[2], tmp_path / f"machine{rank}" / "run")
    saved = checkpoint.read(tmp_path / "machine1" / "run")
    saved["moco_fast"]["step"] -= 1
    checkpoint.write_atomic(tmp_path / "machine1" / "run" / checkpoint.FILE_NAME, saved)
    found = ranks.run(2, rank_with_its_own_folder, tmp_path, folder=tmp_path)
    want = r"the checkpoint in run must be the same .* that of step 10, \w+ on rank 0, that of step 9, \w+ on"
    assert found[0] == found[1] and re.match(want, found[0]), found


def rank_drawing(rank, folder):
    """What a process draws when it has resumed."""
    drawn = []

    def enough(*_):
        drawn.append(float(torch.rand(())))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moco_fast.train.loop._restore_queue", enough)
        with pytest.raises(KeyboardInterrupt):
            run(folder, RECIPE, resume=True)
    return drawn[0]


def test_further_processes_draw_numbers_of_their_own(undisturbed, tmp_path):
    found = ranks.run(4, rank_drawing, undisturbed[2], folder=tmp_path)
    assert len(set(found)) == 4, found


def test_a_checkpoint_is_there_before_a_measurement(tmp_path, monkeypatch):
    """Which can take longer than whoever ends the run waits."""
    accuracy = KnnProbe.accuracy

    def killed(self, model, *arguments):
        if model is not None and (tmp_path / "run" / "checkpoint.pth").exists():
            raise KeyboardInterrupt
        return accuracy(self, model, *arguments)

    monkeypatch.setattr(KnnProbe, "accuracy", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", replace(TINY, checkpoint_every=100))
    assert checkpoint.read(tmp_path / "run")["moco_fast"]["step"] == 4


def rank_of_other_images(rank, folder):
    """One rank's copy of the dataset lacks an image."""
    from moco_fast.data import datasets

    load = datasets.load_dataset

    def load_shorter(*arguments, **options):
        dataset = load(*arguments, **options)
        if rank == 1:
            dataset = replace(dataset, train=dataset.test)
        return dataset

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moco_fast.train.loop.load_dataset", load_shorter)
        try:
            run(folder / "run", replace(RECIPE, batch_size=128))
        except RuntimeError as error:
            return str(error)


def test_processes_with_other_datasets_are_told(tmp_path):
    found = ranks.run(2, rank_of_other_images, tmp_path, folder=tmp_path)
    assert len(set(found)) == 1 and found[0].startswith("the dataset must be the same on every rank"), found
