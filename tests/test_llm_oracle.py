"""The reference of all language-model tests against transformers, on folders that transformers itself has written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.core.params import Array
from fedge.edge.llm.models import config, rope
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.models.template import Template
from tests.llm_reference import logits

pytestmark = pytest.mark.slow  # the import of transformers alone

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "factor": 8.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama of biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama of Llama 3's positions": ("Llama", {"rope_scaling": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
    "llama of linear positions": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral of a short window": ("Mistral", {"sliding_window": 7}),
    "mistral of a window beyond the context": ("Mistral", {"sliding_window": 4096, "head_dim": 32}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6}),
    "qwen2 of windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen2 of YaRN": (
        "Qwen2",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "qwen2 of YaRN, long": (
        "Qwen2",
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
            "max_position_embeddings": 16384,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 of biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
}


def classes(family: str) -> tuple[Any, Any]:
    """Config and model of transformers."""
    from benchmarks.llm_transformers import transformers

    return getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}ForCausalLM")


def build(family: str, fields: dict[str, Any]) -> Any:
    """A transformers model whose every number is random: biases and norms too."""
    import torch

    torch.manual_seed(3)
    settings_of, model_of = classes(family)
    settings = settings_of(**(SIZES | fields))
    settings._attn_implementation = "eager"
    model = model_of(settings).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.125)
            if name.endswith("norm.weight"):
                weight.add_(1)
    return model


def theirs(model: Any, ids: Array) -> Array:
    import torch

    with torch.no_grad():
        found: Array = model(torch.from_numpy(ids[None])).logits[0].float().numpy()
    return found


def relative(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("case", CASES)
def test_the_reference_computes_what_transformers_computes(case: str, tmp_path: Path) -> None:
    model = build(*CASES[case])
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(1).integers(0, 128, 100)
    found = logits(tmp_path, ids)
    assert found.dtype == np.float32
    assert relative(found, theirs(model, ids)) < 1e-5


def test_a_bfloat16_model_in_shards_is_read_number_by_number(tmp_path: Path) -> None:
    import torch

    model = build("Llama", {}).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with open_folder(tmp_path) as folder:
        for name, weight in model.state_dict().items():
            np.testing.assert_array_equal(folder.tensor(name), weight.float().numpy())
    ids = np.random.default_rng(1).integers(0, 128, 40)
    wide = build("Llama", {})  # not model.float(): to bfloat16 and back, its frequencies are rounded too
    wide.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    assert relative(logits(tmp_path, ids), theirs(wide, ids)) < 1e-5


def test_old_and_new_fields_of_positions_read_alike(tmp_path: Path) -> None:
    family, fields = CASES["llama of Llama 3's positions"]
    build(family, fields).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = json.loads(path.read_text())
    new = config.read(tmp_path)
    assert "rope_parameters" in text
    assert new.rope == config.Rope(5e5, "llama3", 8.0, 1.0, 4.0, 64)
    text["rope_scaling"] = {key: value for key, value in text.pop("rope_parameters").items() if key != "rope_theta"}
    path.write_text(json.dumps(text | {"rope_theta": 5e5}))
    assert config.read(tmp_path) == new
    assert replace(new, eos=()) != new
    assert new.eos == (2, 5)


@pytest.mark.parametrize("case", [case for case in CASES if "positions" in case or "YaRN" in case])
def test_far_positions_turn_as_in_transformers(case: str, tmp_path: Path) -> None:
    import torch

    model = build(*CASES[case])
    model.save_pretrained(tmp_path)
    positions = np.array([0, 1, 63, 64, 65, 255])
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.from_numpy(positions[None]))
    for found, wanted in zip(rope.tables(config.read(tmp_path), positions), (cos, sin)):
        np.testing.assert_allclose(found, wanted[0, :, : found.shape[1]].numpy(), atol=2e-5)


CHAT = [
    {"role": "system", "content": "Be brief, ü."},
    {"role": "user", "content": " Ünïcödé & <b>\n"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
CHATML = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages if message.role != 'system' %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant ' ~ ns.last ~ (messages[0] | tojson(indent=2)) }}
{%- endif %}
"""
TURNS = """{{ bos_token }}{% set loop_messages = messages[1:] %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if loop.index0 == 0 %}
[INST] {{ messages[0]['content'] }}

{% endif %}
{{ message['content'].strip() }}{{ ' [/INST]' if message['role'] == 'user' else eos_token }}
{% endfor %}
"""


@pytest.mark.parametrize("source", [CHATML, TURNS])
def test_templates_render_as_in_transformers(source: str) -> None:
    from benchmarks.llm_transformers import transformers

    render_jinja_template = transformers.utils.chat_template_utils.render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    wanted = render_jinja_template([CHAT], chat_template=source, add_generation_prompt=True, **special)[0][0]
    assert Template(source).render(CHAT, special) == wanted
