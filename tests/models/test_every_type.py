"""Every causal model type of transformers: tuned in the layout of the table, or refused by what it is."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING

from fitune.checks import guards, leak, modelchecks
from fitune.core.errors import ModelError
from fitune.core.records import Sample
from fitune.data.batches import flat
from fitune.engine.step import hidden_states, training_step
from fitune.models import adapters, attached, families
from fitune.models.configs import config_of
from fitune.models.families import towers
from fitune.models.interfaces import decoder
from fitune.models.kernels import alone
from fitune.models.kernels.norm import LeanRMSNorm, replace_norms
from fitune.models.parts import trainable
from fitune.models.prepare import ready
from fitune.models.switches import rows_attention
from support import every_type, sweep
from support.contract import config_for

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "families.json"
ROWS = sweep.read(RESULTS)
TUNED = [kind for kind, row in ROWS.items() if row["ways"]["lora"]["outcome"] == "trains"]
# of each kind of structure one: experts, latent attention, an attention of their own, fused projections, parallel and
# shared blocks, states and convolutions of each sort, keys that are chosen, other heads, shared keys and values
QUICK = {  # of the types that are tuned
    "llama4_text", "deepseek_v3", "minicpm3", "gptj", "falcon", "mpt", "codegen", "dbrx", "jetmoe", "openai-gpt",
    "modernbert-decoder", "gemma3n_text", "gemma4_text", "cohere2_moe", "longcat_flash", "mamba", "mamba2", "bamba",
    "falcon_h1", "jamba", "kimi_linear", "lfm2", "minimax", "nemotron_h", "qwen3_5_text", "recurrent_gemma", "rwkv",
    "xlstm", "zamba", "zaya", "deepseek_v32", "inkling_text", "granitemoehybrid", "hrm_text", "hyperclovax", "ctrl",
    "beam", "gpt_neo", "stablelm", "olmo_hybrid", "xglm",
}  # fmt: skip
KEPT = ("outcome", "resumes", "loads", "merges")  # of a way, what the sweep must find again
STATES = ["mamba2", "qwen3_5_text", "kimi_linear", "lfm2", "falcon_h1", "recurrent_gemma", "xlstm"]


def samples() -> list[Sample]:
    """Rows of unequal lengths."""
    random = np.random.default_rng(5)
    return [
        Sample(random.integers(5, 300, length).astype(np.int32), np.arange(length) >= length // 2)
        for length in (44, 31, 9)
    ]


def some(kinds: list[str]) -> list[Any]:
    full = {kind: pytest.mark.full for kind in kinds if kind not in QUICK}
    return [pytest.param(kind, marks=[*there(kind), *([full[kind]] if kind in full else [])]) for kind in kinds]


def there(kind: str) -> list[pytest.MarkDecorator]:
    """A test of a type that the installed transformers does not know yet skips."""
    known = kind in CONFIG_MAPPING
    return [] if known else [pytest.mark.skip(reason=f"transformers {transformers.__version__} has no {kind}")]


@pytest.mark.parametrize("kind", some(TUNED))
def test_a_type_is_tuned_in_the_layout_of_the_table(kind: str) -> None:
    model: Any = adapters.attach(ready(every_type.model_of(kind)), config_for("lora"))
    layout, found = leak.packing_leak(model, samples())
    assert found.level in ("ok", "fixed")
    assert layout == ROWS[kind]["layout"]
    probe = flat(samples(), [0, 1, 2])
    assert guards.grad_reaches(model, probe, layout).level == "ok"
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    model.train()
    done = training_step(model, [probe], optimizer, 1.0, layout)
    assert done.finite
    assert any(not torch.equal(p, before[name]) for name, p in trainable(model).items())


@torch.no_grad()
@pytest.mark.parametrize("kind", STATES)
def test_layers_with_a_state_give_each_document_what_it_gets_alone(kind: str) -> None:
    model: Any = ready(every_type.model_of(kind))
    rows = samples()
    together = hidden_states(model, flat(rows, [0, 1, 2]), "flat")
    with rows_attention(model):
        each = [decoder(model)(input_ids=torch.from_numpy(row.ids)[None].long()).last_hidden_state[0] for row in rows]
    expected = torch.cat(each)
    assert (together - expected).abs().max() <= 1e-5 * expected.abs().max()
    found = modelchecks.layers_with_state(model)
    assert found[0].level == "ok"
    if not any(find_spec(name) for name in modelchecks.KERNELS):
        assert "plain torch code; on a GPU flash-linear-attention, causal-conv1d" in found[0].text
    assert attached.of(model).alone is not None


def test_without_it_the_documents_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fitune.models.prepare.alone.put_into", lambda model, family: None)
    layout, found = leak.packing_leak(ready(every_type.model_of("mamba2")), samples())
    assert layout == "padded"
    assert "flat leaks" in found.text


def test_a_family_without_such_layers_has_none() -> None:
    model: Any = ready(every_type.model_of("llama"))
    assert not modelchecks.layers_with_state(model)
    assert not list(alone.stateful(model, families.of(model)))


@pytest.mark.parametrize("kind", ["afmoe", "deepseek_v32"])
def test_full_tuning_leaves_out_what_only_chooses(kind: str) -> None:
    model: Any = adapters.attach(ready(every_type.model_of(kind)), config_for("full"))
    left_out = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert left_out
    assert all(".indexer." in name or name.endswith("expert_bias") for name in left_out)
    assert guards.grad_reaches(model, flat(samples(), [0, 1, 2]), "documents").level == "ok"


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=there(kind)) for kind in every_type.NO_DECODERS])
def test_what_is_no_decoder_of_text_is_refused_by_what_it_is(kind: str) -> None:
    if kind in towers.TABLE:
        pytest.skip("its language model is tuned")
    values = every_type.default_values(kind)
    with pytest.raises(ModelError, match=rf"model_type '{kind}' (is an? |is the |takes more than text)"):
        config_of(values)


def test_a_bert_that_is_published_as_a_decoder_is_one() -> None:
    values = CONFIG_MAPPING["bert"](is_decoder=True).to_dict()
    assert config_of(values).model_type == "bert"


def test_infinity_as_transformers_writes_it_is_read() -> None:
    config = config_of(json.loads(every_type.config_of("bamba").to_json_string()))
    assert config.time_step_limit[1] == float("inf")


class GroupedRMSNorm(nn.Module):
    """A plain norm, or one of groups of its width, as Qwen4's class has both."""

    def __init__(self, width: int, group: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps, self.group = nn.Parameter(torch.ones(width)), eps, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.float() if self.group is None else x.float().unflatten(-1, (-1, self.group))
        normal = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normal.view(x.shape).to(x.dtype)


def test_a_norm_with_a_setting_of_its_own_is_left_as_it_is() -> None:
    plain, grouped = GroupedRMSNorm(32), GroupedRMSNorm(32, group=8)
    model = nn.ModuleDict({"plain": plain, "grouped": grouped})
    assert replace_norms(model, torch.float32) == (1, ["grouped"])
    assert isinstance(model["plain"], LeanRMSNorm)
    assert model["grouped"] is grouped


@pytest.mark.full
@pytest.mark.parametrize("kind", every_type.TYPES)
def test_the_results_are_what_the_sweep_finds(kind: str, tmp_path: Path) -> None:
    there = ROWS[kind]
    found = asdict(sweep.swept(kind, tmp_path, list(there["ways"])))
    for name, way in there["ways"].items():
        now = found["ways"].get(name) or found["ways"]["lora"]  # what LoRA is refused for is all that is tried
        assert {key: now[key] for key in KEPT} == {key: way[key] for key in KEPT}, now["why"]
    assert found["layout"] == there["layout"]


def test_no_type_fails_and_nearly_every_decoder_trains() -> None:
    """What results/families.json says; each type of the installed transformers is in it."""
    assert set(every_type.TYPES) <= set(ROWS)
    swept = json.loads(RESULTS.read_text(encoding="utf-8"))["transformers"]
    if transformers.__version__ == swept:
        assert set(ROWS) == set(every_type.TYPES)
    failed = [kind for kind, row in ROWS.items() if any(way["outcome"] == "failed" for way in row["ways"].values())]
    assert not failed
    decoders = [row for row in ROWS.values() if row["kind"] == "decoder"]
    assert sum(row["ways"]["lora"]["outcome"] == "trains" for row in decoders) >= 0.95 * len(decoders)


def test_the_page_has_the_table_of_the_results() -> None:
    assert "\n".join(sweep.table(ROWS)) in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
