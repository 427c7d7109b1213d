"""Tiny language models of transformers and peft, built from configurations: nothing is downloaded.

Import this module only where both are installed. Models are made in the default dtype.
"""

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

TINY = {"vocab_size": 17, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **TINY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "use_cache": False,
}
ENCODER = {
    **TINY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
GPT2 = {**TINY, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "n_inner": 12, "use_cache": False}


def make(kind: type[nn.Module], config: hf.PretrainedConfig, attention: str) -> nn.Module:
    """A model in the default dtype; newer configurations would choose float32 by themselves."""
    config._attn_implementation = attention
    model = kind(config).to(torch.get_default_dtype())
    with torch.no_grad():
        for p in model.parameters():  # away from zero biases and unit scales, which hide errors
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def gpt2(attention: str = "sdpa") -> nn.Module:
    """A language model with the output embedding tied to the input's, linear layers stored transposed."""
    return make(hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2), attention)


def gpt2_classifier(attention: str = "sdpa") -> nn.Module:
    """Reads the last token that is not padding: rows are looked up by the data."""
    return make(hf.GPT2ForSequenceClassification, hf.GPT2Config(**GPT2, num_labels=3), attention)


def bert(attention: str = "sdpa") -> nn.Module:
    """A classifier; takes a dictionary with an attention mask."""
    return make(hf.BertForSequenceClassification, hf.BertConfig(**ENCODER, type_vocab_size=2), attention)


def masked_bert(attention: str = "sdpa") -> nn.Module:
    """A masked language model: logits of every token, decoder tied to the embedding."""
    return make(hf.BertForMaskedLM, hf.BertConfig(**ENCODER, type_vocab_size=2), attention)


def distilbert(attention: str = "sdpa") -> nn.Module:
    sizes = {"dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 16, "num_labels": 3}
    return make(hf.DistilBertForSequenceClassification, hf.DistilBertConfig(**TINY, **sizes), attention)


def albert(attention: str = "sdpa") -> nn.Module:
    """One block run three times."""
    config = hf.AlbertConfig(**{**ENCODER, "num_hidden_layers": 3}, embedding_size=6, type_vocab_size=2)
    return make(hf.AlbertForSequenceClassification, config, attention)


def llama(attention: str = "sdpa") -> nn.Module:
    return make(hf.LlamaForCausalLM, hf.LlamaConfig(**DECODER), attention)


def llama_with_lora(attention: str = "sdpa") -> nn.Module:
    """Only the adapters and the classifier's own copy are trained; B is away from its zeros."""
    base = make(hf.LlamaForSequenceClassification, hf.LlamaConfig(**DECODER, num_labels=3), attention)
    return _with_lora(base, ["q_proj", "v_proj", "down_proj"], ["score"])


def gpt2_with_lora(attention: str = "sdpa") -> nn.Module:
    """Adapters of layers that are stored transposed."""
    return _with_lora(gpt2_classifier(attention), ["c_attn"], ["score"], fan_in_fan_out=True)


def _with_lora(base: nn.Module, targets: list[str], saved: list[str], **options: bool) -> nn.Module:
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=targets, modules_to_save=saved, task_type="SEQ_CLS", **options
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model.to(torch.get_default_dtype()).eval()


def mixtral(attention: str = "sdpa", experts: str = "eager") -> nn.Module:
    """Each token goes to two of four experts, whose weights are three-dimensional."""
    config = hf.MixtralConfig(**{**DECODER, "num_hidden_layers": 1}, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = experts
    return make(hf.MixtralForCausalLM, config, attention)


def qwen_moe(attention: str = "sdpa", experts: str = "eager") -> nn.Module:
    """Routed experts beside a shared one, classified from the last token."""
    config = hf.Qwen2MoeConfig(
        **{**DECODER, "num_hidden_layers": 1},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        decoder_sparse_step=1,
        num_labels=3,
    )
    config._experts_implementation = experts
    return make(hf.Qwen2MoeForSequenceClassification, config, attention)


def t5(attention: str = "eager") -> nn.Module:
    """An encoder and a decoder; one embedding for both and for the outputs."""
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    config = hf.T5Config(vocab_size=17, **sizes, relative_attention_num_buckets=6, decoder_start_token_id=0)
    config.use_cache = False
    return make(hf.T5ForConditionalGeneration, config, attention)


def mamba(_: str = "eager") -> nn.Module:
    """A selective state-space model."""
    sizes = {"hidden_size": 6, "state_size": 3, "num_hidden_layers": 1, "conv_kernel": 3, "expand": 2}
    config = hf.MambaConfig(**TINY, **sizes, time_step_rank=2, use_cache=False)
    return make(hf.MambaForCausalLM, config, "eager")
