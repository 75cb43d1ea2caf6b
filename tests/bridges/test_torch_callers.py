"""Libraries that call an optimized model: Hugging Face pipelines, generation and Trainer, and SentenceTransformer."""

import pytest
import torch

import kpx

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.models

SENTENCES = ["one two three", "four", "five six one one two", "three three"]
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "four", "five", "six"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
    )  # fmt: skip


def _bert_config(**settings):
    return transformers.BertConfig(
        vocab_size=len(_WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings,
    )  # fmt: skip


def _classifier():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(_bert_config(num_labels=3))


def test_pipeline_over_a_model_optimized_in_place(tokenizer):
    def scores(model):
        classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
        return [sorted((s["label"], s["score"]) for s in result) for result in classify(SENTENCES)]

    eager = scores(_classifier().eval())
    optimized = scores(kpx.optimize(_classifier().eval(), inplace=True))
    for ours, theirs in zip(optimized, eager, strict=True):
        assert [label for label, _ in ours] == [label for label, _ in theirs]
        assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], rel=1e-4)


def test_batch_encoding_is_an_argument(tokenizer):
    class Reads(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model(**batch).logits

    model = Reads(_classifier().eval())
    optimized = kpx.optimize(model)
    with torch.no_grad():
        for sentences in (SENTENCES, SENTENCES[:2]):
            batch = tokenizer(sentences, padding=True, return_tensors="pt")
            torch.testing.assert_close(optimized(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_model_output_keeps_its_class(tokenizer):
    model = _classifier().eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted, got = model(**batch), kpx.optimize(model)(**batch)
    assert type(got) is type(wanted)
    assert list(got.keys()) == list(wanted.keys())
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-5)


def test_generation_with_a_model_optimized_in_place():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip

    def make():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()

    tokens = torch.tensor([[1, 5, 7, 9]])
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    wanted = make().generate(tokens, **settings)
    assert torch.equal(kpx.optimize(make(), inplace=True).generate(tokens, **settings), wanted)


def test_sentence_transformer_encodes_with_a_model_optimized_in_place(tokenizer, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(0)
    transformers.BertModel(_bert_config()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = modules.Transformer(str(tmp_path))
    pooling = modules.Pooling(words.get_embedding_dimension())
    model = library.SentenceTransformer(modules=[words, pooling], device="cpu")
    wanted = torch.as_tensor(model.encode(SENTENCES))
    assert kpx.optimize(model, inplace=True) is model
    torch.testing.assert_close(torch.as_tensor(model.encode(SENTENCES)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_trainer_trains_a_model_optimized_in_place_as_eager(tokenizer, tmp_path):
    pytest.importorskip("accelerate", reason="not run: the Trainer needs the package accelerate")
    rows = [dict(tokenizer(text), labels=i % 3) for i, text in enumerate(SENTENCES * 2)]

    def trained(model):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[], seed=0,
            learning_rate=1e-2, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        collate = transformers.DataCollatorWithPadding(tokenizer)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)
        loss = trainer.train().training_loss
        return loss, trainer.predict(rows).predictions

    loss, predictions = trained(_classifier())
    our_loss, our_predictions = trained(kpx.optimize(_classifier(), inplace=True))
    assert our_loss == pytest.approx(loss, rel=1e-3)
    torch.testing.assert_close(torch.as_tensor(our_predictions), torch.as_tensor(predictions), rtol=1e-2, atol=1e-3)
