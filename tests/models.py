"""The table of models: whole models as people bring them, from their configurations, unmodified.

Every batch has uneven lengths: padded positions are masked, and their labels are -100.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput

from tests.networks import ConvNeXtBlock, Encoder, RecurrentLanguageModel, TiedAutoencoder, UNet, resnet, transformer
from tests.oracle import coupled_loss

LENGTHS = (6, 4, 3)  # positions of every example that are not padding
B, T, VOCABULARY = len(LENGTHS), max(LENGTHS), 41
PADDING = 1  # RoBERTa and those after it count positions from the padding id on


class Row(NamedTuple):
    """`make` builds the model and `batch` its keyword arguments; `cut` and `ignore` are as for the oracle."""

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    cut: tuple[str | int, ...] = ("logits",)
    ignore: tuple[str, ...] = ()
    example_dims: int | dict[str, int | None] = 0  # of the arguments, where they are not in front
    example_dim: int = 0  # of the cut
    bar: float = 1e-9  # in float64


def build(row: Row) -> nn.Module:
    """The row's model in training mode, the same one every time, without the zeros and ones of its initialisation:
    they would hide errors (LoRA's B = 0 gives A no gradient at all)."""
    torch.manual_seed(0)
    model = row.make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.train()


def draw(row: Row, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(1)
    return {name: x.to(dtype) if is_floating(x) else x for name, x in row.batch().items()}


def is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def batch_loss(output: Any, y: None = None) -> Tensor:
    """The model's own loss where it has one, and one that couples the examples where it has not."""
    if isinstance(output, ModelOutput):
        return output.loss
    return coupled_loss(output.movedim(output.shape.index(B), 0), torch.arange(1.0, B + 1, dtype=output.dtype) / B)


# Batches


def ids(*shape: int) -> Tensor:
    return torch.randint(PADDING + 3, VOCABULARY, shape)


def padding(lengths: Sequence[int] = LENGTHS) -> Tensor:
    return torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)  # (b, t)


def text(lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    mask = padding(lengths)
    return {"input_ids": ids(*mask.shape).masked_fill(mask, PADDING), "attention_mask": (~mask).long()}


def labels(lengths: Sequence[int] = LENGTHS) -> Tensor:
    """Of every position, but padding and one more of the first example."""
    mask = padding(lengths)
    mask[0, 1] = True
    return ids(*mask.shape).masked_fill(mask, -100)


def language(lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    return text(lengths) | {"labels": labels(lengths)}


def images(size: int, channels: int = 3) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(B, channels, size, size), "labels": torch.randint(0, 3, (B,))}


def pairs() -> dict[str, Any]:
    return text() | {"pixel_values": torch.randn(B, 3, 8, 8), "return_loss": True}


def speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(B, 4, 16), "labels": labels()}


# Hugging Face


def configured(model: type[hf.PreTrainedModel], **settings: Any) -> Callable[[], nn.Module]:
    """`model` from its configuration, every kind of dropout off unless set."""

    def make() -> nn.Module:
        config = model.config_class(pad_token_id=PADDING, **settings)
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float) and name not in settings:
                setattr(config, name, 0.0)
        return model(config)

    return make


ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
DECODER = ENCODER | {"num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
SEQUENCE_TO_SEQUENCE = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}


def clip() -> nn.Module:
    # The text embedding is taken at the first end-of-text token, or at the highest id when that is 2.
    text_config = ENCODER | {"eos_token_id": 2, "pad_token_id": PADDING}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text_config, vision_config=VISION, projection_dim=8))


def lora(make: Callable[[], nn.Module], *targets: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: peft.get_peft_model(
        make(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), task_type="CAUSAL_LM", **settings)
    )


gpt2 = configured(hf.GPT2LMHeadModel, **GPT2)
llama = configured(hf.LlamaForCausalLM, **DECODER)
# Eager, because the default, a grouped matmul, has no float64.
mixtral = configured(hf.MixtralForCausalLM, **DECODER, num_local_experts=4, experts_implementation="eager")


class Balanced(nn.Module):
    """Mixtral's outputs, copied: none is computed from another, so that each has a cotangent of its own."""

    def __init__(self, mixtral: nn.Module):
        super().__init__()
        self.mixtral = mixtral

    def forward(self, **batch):
        output = self.mixtral(**batch)
        return {
            "logits": output.logits.clone(),
            "router": tuple(r.clone() for r in output.router_logits),
            "batch": batch,
        }

    def loss(self, output, y):
        config, batch = self.mixtral.config, output["batch"]
        balance = load_balancing_loss_func(
            output["router"], config.num_local_experts, config.num_experts_per_tok, batch["attention_mask"]
        )
        own = self.mixtral.loss_function(output["logits"], batch["labels"], VOCABULARY)
        return own + self.mixtral.router_aux_loss_coef * balance


HUGGING_FACE: dict[str, Row] = {
    "gpt2": Row(gpt2, language),
    "bert": Row(configured(hf.BertForMaskedLM, **ENCODER), language),
    "roberta": Row(configured(hf.RobertaForMaskedLM, **ENCODER), language),
    "t5": Row(
        configured(
            hf.T5ForConditionalGeneration,
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            relative_attention_num_buckets=8,
            decoder_start_token_id=0,
        ),
        language,
    ),
    "vit": Row(configured(hf.ViTForImageClassification, **VISION, num_labels=3), images(8)),
    "llama": Row(llama, language),
    "deberta-v2": Row(
        configured(
            hf.DebertaV2ForMaskedLM,
            **ENCODER,
            relative_attention=True,
            max_relative_positions=4,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            conv_kernel_size=3,
            type_vocab_size=2,
        ),
        language,
    ),
    # The loss couples examples; logit_scale multiplies what is coupled, so no example has a gradient of its own for it.
    "clip": Row(clip, pairs, cut=("text_embeds", "image_embeds"), ignore=("logit_scale",)),
    "mixtral": Row(mixtral, language),
    "mamba": Row(
        configured(
            hf.MambaForCausalLM, vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, conv_kernel=3
        ),
        language,
    ),
    # Attention owns a bare parameter, so that it becomes a vmap leaf, and appends to the cache that it is given.
    "gpt-oss": Row(
        configured(hf.GptOssForCausalLM, **DECODER, num_local_experts=4, experts_implementation="eager"), language
    ),
    "llama 4": Row(
        configured(hf.Llama4ForCausalLM, **DECODER, num_local_experts=4, intermediate_size_mlp=24), language
    ),
    "opt": Row(configured(hf.OPTForCausalLM, **ENCODER, ffn_dim=24, word_embed_proj_dim=16), language),
    "distilbert": Row(
        configured(
            hf.DistilBertForMaskedLM,
            vocab_size=VOCABULARY,
            dim=16,
            hidden_dim=24,
            n_layers=2,
            n_heads=2,
            max_position_embeddings=12,
        ),
        language,
    ),
    "albert": Row(configured(hf.AlbertForMaskedLM, **ENCODER, embedding_size=8), language),
    "qwen2": Row(configured(hf.Qwen2ForCausalLM, **DECODER), language),
    # Its normalisation multiplies by the weight in float32, whatever the model's dtype.
    "gemma": Row(configured(hf.GemmaForCausalLM, **DECODER), language, bar=1e-6),
    "modernbert": Row(
        configured(hf.ModernBertForMaskedLM, **ENCODER, cls_token_id=0, sep_token_id=2, bos_token_id=0, eos_token_id=2),
        language,
    ),
    "electra": Row(configured(hf.ElectraForMaskedLM, **ENCODER, embedding_size=8), language),
    "swin": Row(
        configured(
            hf.SwinForImageClassification,
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=4,
            num_labels=3,
            use_absolute_embeddings=True,
        ),
        images(16),
    ),
    "convnext": Row(
        configured(
            hf.ConvNextForImageClassification,
            patch_size=2,
            num_stages=2,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            num_labels=3,
        ),
        images(8),
    ),
    "whisper": Row(
        configured(
            hf.WhisperForConditionalGeneration,
            **SEQUENCE_TO_SEQUENCE,
            num_mel_bins=4,
            max_source_positions=8,
            max_target_positions=12,
        ),
        speech,
    ),
    "gpt-neox": Row(configured(hf.GPTNeoXForCausalLM, **ENCODER), language),
    "phi": Row(configured(hf.PhiForCausalLM, **ENCODER), language),
    "bart": Row(
        configured(hf.BartForConditionalGeneration, **SEQUENCE_TO_SEQUENCE, max_position_embeddings=12), language
    ),
    "lora on gpt2": Row(lora(gpt2, "c_attn", "c_proj", fan_in_fan_out=True), language),
    # Its autograd.Function takes the parameters out of a ParameterDict that is never called.
    "loha on llama": Row(
        lambda: peft.get_peft_model(llama(), peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"])), language
    ),
    "lora on llama": Row(lora(llama, "q_proj", "v_proj"), language),
}

# torch


def vectors(*shape: int, **more: Callable[[], Tensor]) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"x": torch.randn(*shape)} | {name: draw() for name, draw in more.items()}


def images_alone(size: int, channels: int = 3, name: str = "input") -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(B, channels, size, size)}


def source_and_target(batch_first: bool) -> Callable[[], dict[str, Tensor]]:
    def batch() -> dict[str, Tensor]:
        src, tgt = torch.randn(B, T, 8), torch.randn(B, T - 1, 8)
        if not batch_first:
            src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
        causal = nn.Transformer.generate_square_subsequent_mask(T - 1)
        return {"src": src, "tgt": tgt, "tgt_mask": causal, "src_key_padding_mask": padding().float() * -1e9}

    return batch


TORCH: dict[str, Row] = {
    "encoder, batch first": Row(lambda: Encoder(True), vectors(B, T, 8, mask=padding), cut=()),
    "encoder, positions first": Row(
        lambda: Encoder(False), vectors(T, B, 8, mask=padding), cut=(), example_dims={"x": 1, "mask": 0}, example_dim=1
    ),
    "transformer, batch first": Row(transformer(True), source_and_target(True), cut=()),
    "transformer, positions first": Row(
        transformer(False),
        source_and_target(False),
        cut=(),
        example_dims={"src": 1, "tgt": 1, "tgt_mask": None, "src_key_padding_mask": 0},
        example_dim=1,
    ),
    "resnet": Row(resnet, images_alone(8), cut=()),
    "convnext block": Row(ConvNeXtBlock, images_alone(8, 4, "x"), cut=()),
    "unet": Row(UNet, images_alone(8, name="x"), cut=()),
    "recurrent language model": Row(
        lambda: RecurrentLanguageModel(VOCABULARY), lambda: {"input_ids": ids(B, T)}, cut=()
    ),
    "tied autoencoder": Row(TiedAutoencoder, vectors(B, 6), cut=()),
}

MODELS = HUGGING_FACE | TORCH
