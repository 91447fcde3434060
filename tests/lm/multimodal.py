"""Models that also read images, small and with random weights. `MULTIMODAL` is the list of them."""

import functools
from dataclasses import dataclass

import pytest
import torch
import transformers
from networks import SMALL, VOCABULARY, WINDOW, path_of
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from versions import TRANSFORMERS, dtype_of

# Behind the tokens of texts are those that stand for images.
TEXT = {"vocab_size": VOCABULARY + 8, **SMALL}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 8}
QWEN_OUT = {"intermediate_size": 32, "out_hidden_size": 16}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
IMAGE = {"image_token_index": 64}
IDS = {"image_token_id": 64}
QWEN_IDS = {
    **IDS,
    "video_token_id": 65,
    "vision_start_token_id": 66,
    "vision_end_token_id": 67,
}
ENDS = {"boi_token_index": 65, "eoi_token_index": 66}
_LLAMA4_VISION = ("vision_output_dim", "projector_input_dim", "projector_output_dim")


@dataclass(frozen=True)
class Multimodal:
    """A kind of model: its class, and the options of its configuration.

    Attributes:
        text, vision, options: of the configuration's parts, and of the whole.
        prefix: of the class, before `ForConditionalGeneration`.
        tower: module for images, in the model.
    """

    prefix: str
    text: dict
    vision: dict
    options: dict
    tower: str = "model.vision_tower"


MULTIMODAL = {
    "gemma3": Multimodal(
        "Gemma3",
        {**TEXT, "sliding_window": WINDOW},
        VISION,
        {**IMAGE, **ENDS, "mm_tokens_per_image": 4},
    ),
    "gemma4": Multimodal(
        "Gemma4",
        {
            **TEXT,
            "sliding_window": WINDOW,
            "vocab_size_per_layer_input": VOCABULARY + 8,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 8,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {**VISION, "head_dim": 8, "num_key_value_heads": 2},
        {
            **IDS,
            "audio_config": None,
            "boi_token_id": 65,
            "eoi_token_id": 66,
            "video_token_id": 67,
            "audio_token_id": 68,
        },
    ),
    "llama4": Multimodal(
        "Llama4",
        {
            **TEXT,
            "intermediate_size_mlp": 32,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": WINDOW,
            "moe_layers": [1],
        },
        {**VISION, **dict.fromkeys(_LLAMA4_VISION, 16)},
        {**IMAGE, **ENDS},
        "vision_model",
    ),
    "mllama": Multimodal(
        "Mllama",
        {**TEXT, "cross_attention_layers": [1]},
        {
            **VISION,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        {},
        "model.vision_model",
    ),
    "qwen2_vl": Multimodal(
        "Qwen2VL", {**TEXT, **ROPE}, {**QWEN_VISION, "embed_dim": 16}, QWEN_IDS, "model.visual"
    ),
    "qwen2_5_vl": Multimodal(
        "Qwen2_5_VL", {**TEXT, **ROPE}, {**QWEN_VISION, **QWEN_OUT}, QWEN_IDS, "model.visual"
    ),
    "qwen3_vl": Multimodal(
        "Qwen3VL",
        {**TEXT, **ROPE},
        {**QWEN_VISION, **QWEN_OUT, "deepstack_visual_indexes": [0]},
        QWEN_IDS,
        "model.visual",
    ),
    "llava": Multimodal(
        "Llava",
        {**TEXT, "model_type": "llama"},
        {**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
        IMAGE,
    ),
    "mistral3": Multimodal(
        "Mistral3",
        {**TEXT, "model_type": "mistral", "sliding_window": None},
        {**VISION, "model_type": "pixtral", "head_dim": 8},
        IMAGE,
    ),
    "paligemma": Multimodal(
        "PaliGemma",
        {**TEXT, "model_type": "gemma"},
        {**VISION, "model_type": "siglip_vision_model"},
        {**IMAGE, "projection_dim": 16},
    ),
    "idefics3": Multimodal(
        "Idefics3",
        {**TEXT, "model_type": "llama"},
        VISION,
        {**IDS, "scale_factor": 2},
        "model.vision_model",
    ),
    "internvl": Multimodal(
        "InternVL",
        {**TEXT, "model_type": "qwen2"},
        {**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
        IDS,
    ),
}


@functools.cache
def network(kind):
    """A small model in float64, which is shared: copy it before changing it."""
    of = MULTIMODAL[kind]
    if TRANSFORMERS.major < 5 or kind not in CONFIG_MAPPING:
        pytest.skip(f"{kind} has another form in transformers {TRANSFORMERS}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, text_config=dict(of.text), vision_config=dict(of.vision), **of.options
    )
    make = getattr(transformers, f"{of.prefix}ForConditionalGeneration")
    model = make._from_config(config, **dtype_of(torch.float64)).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others' kernels refuse float64
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(8)
    return model


def measured(kind):
    """A row of the page."""
    model, loads = network(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    how = "no; give the loaded model" if loads is None else f"yes, as `{loads}`"
    return [f"`{kind}`", how, f"`{path_of(model, model.get_input_embeddings())}`"]
