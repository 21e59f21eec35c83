"""tokens.py: every layout of a full prompt, with tokenizers of Hugging Face where transformers is installed."""

import json

import pytest
import torch
import torch.nn.functional as F
from families import small_config

from trainers.prompting.backbone import load_clip
from trainers.prompting.prompts import PromptLearner
from trainers.prompting.text_encoder import TextEncoder, encode_texts
from trainers.prompting.tokens import Tokenizer

WORDS = {"a": 7, "big": 8, "cat": 9, "dog": 9}


class Words:
    """A tokenizer of whole words with a layout: head, [EOT], padding, tail."""

    context_length = 16

    def __init__(self, head, eot, pad, tail):
        self.head, self.eot, self.pad, self.tail = head, eot, pad, tail

    def __call__(self, texts, context_length):
        rows = [[*self.head, *(WORDS[word] for word in text.split()), self.eot] for text in texts]
        padding = [self.pad] * context_length
        return torch.tensor([(row + padding)[: context_length - len(self.tail)] + self.tail for row in rows])


@pytest.mark.parametrize(
    "layout",
    [([1], 2, 0, []), ([], 1, 1, []), ([], 1, 0, []), ([3], 0, 0, []), ([1], 2, 0, [4])],
    ids=["XLM", "SigLIP", "SigLIP2", "CLIPA", "CLIPS"],
)
def test_layouts(layout):
    tokenizer = Tokenizer(Words(*layout))
    assert (tokenizer.head, tokenizer.eot, tokenizer.pad, tokenizer.tail) == layout
    assert tokenizer.encode("a big cat") == [7, 8, 9] and tokenizer.encode("") == []
    assert tokenizer.encode_after_words("big cat") == [8, 9] and tokenizer.context_length == 16
    head, full = len(layout[0]), tokenizer.padded("a a a", 12)
    assert tokenizer.placeholder(head + 3, 12) == full and len(full) == 12


def hugging_face(kind, folder):
    """Save a tokenizer trained on a few words: SentencePiece as SigLIP's, SigLIP2's and XLM's, WordPiece as BERT's."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    special, layout, pad, space = {
        "SigLIP": (["<unk>", "</s>"], "$A </s>", "</s>", "always"),
        "SigLIP2": (["<pad>", "</s>", "<unk>"], "$A </s>", "<pad>", "never"),
        "XLM": (["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", "<pad>", "always"),
        "BERT": (["[PAD]", "<unk>", "[CLS]", "[SEP]"], "[CLS] $A [SEP]", "[PAD]", ""),
    }[kind]
    corpus = ["a photo of a cat.", "a fire truck.", "my moth"] * 20
    if space:
        made = tokenizers.Tokenizer(tokenizers.models.Unigram())
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=space)
        trainer = tokenizers.trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    else:
        made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=90, special_tokens=special)
    made.train_from_iterator(corpus, trainer)
    ids = [(token, made.token_to_id(token)) for token in layout.split() if token != "$A"]
    made.post_processor = tokenizers.processors.TemplateProcessing(single=layout, special_tokens=ids)
    more = {"sep_token": "[SEP]"} if kind == "BERT" else {}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, **more).save_pretrained(folder)


@pytest.mark.parametrize(
    "kind, family, text",
    [("SigLIP", "SigLIP", {}), ("SigLIP2", "SigLIP2", {}), ("XLM", "MetaCLIP worldwide", {"eos_id": 2}),
     ("BERT", "CLIPA", {"tokenizer_kwargs": {"strip_sep_token": True}}), ("XLM", "ViT", {"hf_model_name": "roberta"})],
)  # fmt: skip
@torch.no_grad()
def test_hugging_face_s_equal_open_clip(kind, family, text, tmp_path):
    """Tokenizers, and a text tower: hand-made prompts and contexts of words have open_clip's features."""
    import open_clip
    from safetensors.torch import save_model

    hugging_face(kind, tmp_path)
    config = small_config(family)
    if "hf_model_name" in text:
        import transformers

        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"vocab_size": 600, "max_position_embeddings": 90, "pad_token_id": 1}
        transformers.RobertaConfig(**sizes).save_pretrained(tmp_path)
        text = {"hf_model_name": str(tmp_path), "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
        config["text_cfg"], config["custom_text"] = {"context_length": 77}, True
    else:
        config["text_cfg"]["vocab_size"] = 600
    config["text_cfg"].update(text, hf_tokenizer_name=str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    name = f"local-dir:{tmp_path}"
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False, pretrained_text=False).eval()
    for key, value in model.state_dict().items():
        if value.dim() > 1:
            value.normal_(std=1 if "embed" in key else 1.5 * value[0].numel() ** -0.5)
    save_model(model, str(tmp_path / "open_clip_model.safetensors"))
    backbone, names = load_clip(name), ["cat", "fire truck", "moth"]
    assert backbone.causal_text == (family == "MetaCLIP worldwide")
    texts = [f"a photo of a {name}." for name in names]
    expected = F.normalize(model.encode_text(open_clip.get_tokenizer(name)(texts)), dim=-1)
    assert (expected @ expected.T).fill_diagonal_(0).max() < 1 - 1e-4
    learner = PromptLearner(backbone, names, ctx_init="a photo of a")
    for inputs in (learner(), learner.encoder_inputs()):
        torch.testing.assert_close(TextEncoder(backbone)(*inputs), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(encode_texts(backbone, texts), expected, atol=1e-5, rtol=0)
