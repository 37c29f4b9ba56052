"""docs/longer_rows.md, command by command: from a Hugging Face folder to one with longer rows."""

import json
import re
import shutil

import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, open_data, read_metrics, run

from checkpoint.__main__ import sample
from data import IGNORED_LABEL

EVAL_ITERS = 2


@pytest.fixture(scope="module")
def longer(once):
    """The folder of the page's files, and what its commands printed."""
    page = (ROOT / "docs/longer_rows.md").read_text()
    script, commands = re.search(r"```python\n(.*?)```.*?```bash\n(.*?)```", page, re.S).groups()

    def fill(folder):
        (folder / "make_model.py").write_text(script)
        command = "set -euo pipefail\n" + commands.replace("longer/", f"{folder}/")
        (folder / "output.txt").write_text(run("bash", "-c", command).stdout)

    folder = once("longer", fill)
    return folder, (folder / "output.txt").read_text()


def evaluated(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"\neval_loss: ([\d.]+)", output)]


def test_the_second_stage_learns_longer_rows(longer):
    folder, output = longer
    first_stage, second_stage = evaluated(output)
    assert second_stage < first_stage - 0.02
    records = read_metrics(folder / "4096")
    assert [record["step"] for record in records] == [*range(1, 13)], "a new run"
    assert records[0]["loss"] < read_metrics(folder / "512")[0]["loss"] - 1, "of a trained model"
    assert "mesh: dp 1 x cp 2, 2 processes" in output


def test_transformers_computes_the_same_loss_from_the_exported_folder(longer):
    folder, output = longer
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    source = open_data(
        folder / "corpus", "validation", 1024, validation_fraction=0.1, num_batches=EVAL_ITERS
    )
    rows = source.rows(0, EVAL_ITERS, 4096)
    tokens, labels = (torch.from_numpy(x).flatten() for x in (rows.tokens, rows.labels))
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        lengths = rows.document_lengths
        for ids, wanted in zip(tokens.split(lengths), labels.split(lengths), strict=True):
            logits = model(ids[None]).logits[0].double()
            total += torch.nn.functional.cross_entropy(
                logits, wanted, ignore_index=IGNORED_LABEL, reduction="sum"
            )
    loss = total / (labels != IGNORED_LABEL).sum()
    assert evaluated(output)[1] == pytest.approx(loss.item(), abs=1e-4)


def test_the_exported_folder_is_the_first_one_with_longer_rows(longer):
    folder, _ = longer
    base, exported = (json.loads((folder / f"{x}/config.json").read_text()) for x in ("base", "hf"))
    for key in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id"):
        assert exported[key] == base[key], key
    assert exported["max_position_embeddings"] == 4096
    config = transformers.AutoConfig.from_pretrained(folder / "hf")
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == 8
    generation = transformers.GenerationConfig.from_pretrained(folder / "hf")
    assert generation.eos_token_id == base["eos_token_id"] == 1
    text = "def longer(rows: int) -> str:\n    return 'é' * rows  # 4,096\n"
    first, last = (transformers.AutoTokenizer.from_pretrained(folder / x) for x in ("base", "hf"))
    assert first.encode(text) == last.encode(text)


def test_sample_writes_what_transformers_writes_from_the_exported_folder(longer, capsys):
    folder, output = longer
    sample(f"{folder}/4096", "import ", tokens=40, temperature=0.0, seed=0)
    written = capsys.readouterr().out
    assert written.startswith("import ")
    assert output.endswith(written), "the pipeline's is the page's last output"
    outputs = set()
    for seed in (0, 1):
        sample(f"{folder}/4096", "import ", tokens=40, temperature=1.0, seed=seed)
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 2


def test_sample_adds_no_token_to_the_prompt(longer, capsys, tmp_path):
    """Training has none there, so the tokenizer's template, here </s> behind it, is left out."""
    folder, _ = longer
    sample(f"{folder}/4096", "import ", tokens=20, temperature=0.0, seed=0)
    expected = capsys.readouterr().out
    shutil.copytree(folder / "4096", tmp_path / "run")
    path = tmp_path / "run/tokenizer/tokenizer.json"
    codec = tokenizers.Tokenizer.from_file(str(path))
    end = codec.id_to_token(1)
    codec.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, 1)]
    )
    assert codec.encode("import ").ids[-1] == 1
    codec.save(str(path))
    sample(str(tmp_path / "run"), "import ", tokens=20, temperature=0.0, seed=0)
    assert capsys.readouterr().out == expected
    path.write_text("{")
    with pytest.raises(ValueError, match="the tokenizer .* cannot be loaded: "):
        sample(str(tmp_path / "run"), "import ", tokens=1, temperature=0.0, seed=0)


def test_a_checkpoint_without_a_tokenizer_or_a_prompt_without_tokens_is_one_sentence(
    longer, undisturbed
):
    folder, _ = longer
    with pytest.raises(ValueError, match="--prompt '' has no token; give a text"):
        sample(f"{undisturbed[1]}", "", tokens=1, temperature=0.0, seed=0)
