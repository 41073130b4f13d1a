"""The benchmark of the whole step: its report, its breakdown, and that wrong losses are refused."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from bench import stages, step
from bench.case import OURS

CPU = torch.device("cpu")


def test_command(tmp_path, capsys):
    step.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*-step.json")
    (result,) = json.loads(path.read_text())["configs"]
    assert [way["name"] for way in result["ways"]] == step.WAYS
    assert result["ways"][0]["tax"] == 1
    for way in result["ways"]:
        assert 0 < way["p20_ms"] <= way["p50_ms"] <= way["p80_ms"] and way["images_per_s"] > 0
        assert way["host_gaps_ms"] is None  # a CPU has none
    printed = capsys.readouterr().out
    assert "tax" in printed and step.EAGER in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [step.FUSED, step.DROP_IN, step.EAGER])
def test_every_stage_is_seen(name):
    """Marks of one step, in order; and nothing of the watching stays behind."""

    class Listening(stages.Clock):
        def mark(self, stage):
            seen.append(stage)
            super().mark(stage)

    seen = []
    one = step.Step(name, step.QUICK_CONFIGS[0], CPU)
    clock = Listening(CPU)
    with stages.watch(one.model, clock):
        clock.start()
        one(clock.mark)
    found = clock.seconds()
    assert all(found[stage] > 0 for stage in stages.STAGES)
    # Ours moves the keys before it encodes the queries: FSDP has let go of neither encoder's shards then.
    query, move = ["other", "encoders"], ["other", "EMA"]
    assert seen[:4] == (move + query if name.startswith(OURS) else query + move)
    assert seen[-5:] == ["enqueue", "loss", "loss", "encoders", "optimizer"]
    count = len(seen)
    one(lambda stage: None)
    assert len(seen) == count


def test_bare_step_has_no_key_update():
    one = step.Step(step.BARE, step.QUICK_CONFIGS[0], CPU)
    queue, key = one.model.queue.clone(), next(one.model.encoder_k.parameters()).clone()
    query = next(one.model.encoder_q.parameters()).clone()
    one()
    assert torch.equal(one.model.queue, queue)
    assert torch.equal(next(one.model.encoder_k.parameters()), key)
    assert not torch.equal(next(one.model.encoder_q.parameters()), query)


def test_losses_that_differ_are_named_and_not_timed(monkeypatch):
    monkeypatch.setattr(step.moco_fast.MoCo, "loss", lambda self, q, k: self.encoder_q(q).mean())
    monkeypatch.setattr(step, "WAYS", [step.BARE, step.FUSED, step.EAGER])
    monkeypatch.setattr(step.Step, "breakdown", lambda self: {})
    monkeypatch.setattr(step, "peak_extra", lambda one, where: 0)
    result = step.measure_config(step.QUICK_CONFIGS[0], CPU, 1e-6)
    assert [way["name"] for way in result["ways"]] == [step.BARE, step.EAGER]
    (line,) = result["failed"]
    assert f"{step.FUSED}: its loss is" in line


def test_configs_are_saved_one_by_one(tmp_path, monkeypatch):
    """One that crashes does not end the next; what was measured is written before that begins."""
    first, *_ = step.QUICK_CONFIGS
    crashing, last = (replace(first, batch=batch) for batch in (6, 8))
    way = {"name": step.BARE, "p20_ms": 1, "p50_ms": 1, "p80_ms": 1, "tax": 1, "images_per_s": 1}
    way |= {"extra_memory_mb": 1, "stages_ms": {}, "host_gaps_ms": None}
    saved = []

    def crash(config, where, seconds):
        saved.extend(len(json.loads(path.read_text())["configs"]) for path in tmp_path.glob("*.json"))
        if config == crashing:
            raise MemoryError("too large")
        return {"config": vars(config), "label": str(config), "rounds": 7, "ways": [way], "failed": []}

    monkeypatch.setattr(step, "QUICK_CONFIGS", [first, crashing, last])
    monkeypatch.setattr(step, "measure_config", crash)
    with pytest.raises(SystemExit, match=r"N=6.*: MemoryError: too large"):
        step.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    figures = json.loads(path.read_text())
    assert saved == [1, 1] and [one["config"]["batch"] for one in figures["configs"]] == [4, 8]
    assert len(figures["failed"]) == 1 and path.with_suffix(".png").exists()


def test_configs_are_chosen_by_name():
    cuda = torch.device("cuda", 0)
    (config,) = step.chosen(["resnet50-256-bf16"], False, cuda)
    assert config == step.Config("resnet50", 256, 224, bf16=True)
    assert step.chosen(None, False, cuda) == step.GPU_CONFIGS
    with pytest.raises(ValueError, match="no config resnet5; there are resnet18-32, resnet18-32-bf16"):
        step.chosen(["resnet5"], False, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("name", step.WAYS)
def test_gpu_step(name):
    device = torch.device("cuda", 0)
    one = step.Step(name, step.QUICK_CONFIGS[0], device)
    one()
    assert 0 < one.timer()() < 10
    if name != step.BARE:
        assert all(ms >= 0 for ms in one.breakdown().values())
    assert stages.busy_seconds(one, device) is None or stages.busy_seconds(one, device) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a profiler of GPUs")
def test_no_profiler_no_busy_seconds():
    """The times of a whole configuration do not go with them."""
    assert stages.busy_seconds(lambda: pytest.fail("stepped"), torch.device("cuda", 0)) is None


def test_the_readme_gets_the_tables(tmp_path, monkeypatch):
    way = {"name": step.BARE, "p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "tax": 1.25, "images_per_s": 500.0}
    way |= {"extra_memory_mb": 7.0, "stages_ms": {}, "host_gaps_ms": None}
    result = {"config": {}, "label": "a small one", "rounds": 7, "ways": [way], "failed": []}
    monkeypatch.setattr(step, "measure_config", lambda config, where, seconds: dict(result))
    monkeypatch.setattr(step.step_plot, "plot", lambda path, figures: None)
    document = tmp_path / "README.md"
    document.write_text("no markers")
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--readme", str(document)]
    with pytest.raises(SystemExit, match="readme must hold <!-- step:begin -->"):
        step.main(arguments)
    document.write_text("before\n<!-- step:begin -->\nold\n<!-- step:end -->\nafter\n")
    step.main(arguments)
    text = document.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert "a small one:" in text and "| bare encoders | 1 / 2 / 3 ms | 1.250 | 500 | 7 |" in text
