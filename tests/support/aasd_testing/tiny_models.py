"""Checkpoints made on the spot: small models of other kinds with random weights, and an adapter for the demo model."""

import json
import pathlib
import shutil

import torch

WINDOW = 64


def sliding_window_model(out: pathlib.Path, tokenizer_of: str, hybrid: bool) -> str:
    """Make a model whose attention layers slide: all of them, or every other one."""
    import transformers

    sizes = {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
    }
    if hybrid:
        layer_types = ["sliding_attention", "full_attention"] * 2
        config = transformers.Gemma3TextConfig(
            **sizes, num_hidden_layers=4, layer_types=layer_types, query_pre_attn_scalar=32
        )
        model = transformers.Gemma3ForCausalLM
    else:
        config, model = transformers.MistralConfig(**sizes, num_hidden_layers=2), transformers.MistralForCausalLM
    torch.manual_seed(1)
    model(config).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        source = pathlib.Path(tokenizer_of) / name
        if source.exists():
            shutil.copy(source, out)
    return str(out)


def image_model(out: pathlib.Path, tokenizer_of: str) -> tuple[str, int]:
    """Make an Idefics3 that sees images as four tokens each; of vLLM's models one that does without torchvision.

    Returns:
        Its path, and the token that stands for an image in a prompt.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_of)
    around = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *around]})
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    side = 28
    text_config = transformers.LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = transformers.Idefics3Config(
        text_config=text_config,
        vision_config={**sizes, "image_size": side, "patch_size": 7},
        image_token_id=image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    transformers.Idefics3ForConditionalGeneration(config).save_pretrained(out)
    pixels = transformers.Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": side}, max_image_size={"longest_edge": side}
    )
    transformers.Idefics3Processor(image_processor=pixels, tokenizer=tokenizer, image_seq_len=4).save_pretrained(out)
    return str(out), image_token_id


def lora_adapter(out: pathlib.Path, model: str, rank: int = 8, seed: int = 5) -> str:
    """Make a random adapter of the attention's projections, strong enough to change what a model says."""
    from safetensors.torch import save_file

    config = json.loads((pathlib.Path(model) / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_size = config["hidden_size"] // heads
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in (("q_proj", heads), ("v_proj", config["num_key_value_heads"])):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = 0.05 * torch.randn(rank, config["hidden_size"], generator=random)
            weights[f"{prefix}.lora_B.weight"] = 0.05 * torch.randn(width * head_size, rank, generator=random)
    out.mkdir()
    save_file(weights, out / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    (out / "adapter_config.json").write_text(json.dumps(adapter))
    return str(out)


def without_layers(out: pathlib.Path, model: str, dropped: set[int]) -> str:
    """Make a draft model of a model by leaving out some of its layers: it often, but not always, agrees with it."""
    import transformers

    made = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    kept = [layer for at, layer in enumerate(made.model.layers) if at not in dropped]
    made.model.layers, made.config.num_hidden_layers = torch.nn.ModuleList(kept), len(kept)
    made.save_pretrained(out)
    return str(out)
