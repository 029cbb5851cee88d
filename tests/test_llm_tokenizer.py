"""Tokenizers: text there and back, streams that never break a character, templates in their sandbox."""

import json
import sys
import threading
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers

from fedge.core.errors import DataError, ModelError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.models.template import Template
from fedge.edge.llm.models.tokenizer import Tokenizer
from tests.llm_fixture import folder

CHAT = [{"role": "user", "content": "Hi <you> & me"}, {"role": "assistant", "content": "Yes"}]


def sentencepiece(path: Path, metaspace: bool = False) -> Path:
    """Replace the tokenizer of a folder by one of Llama 2's form: words with their space, and bytes."""
    words = ["▁", "▁a", "a", "▁▁", "▁the", "cat", "é", "日", "\n", "▁é"]
    table = {
        piece: at for at, piece in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])
    }
    inner = tokenizers.Tokenizer(models.BPE(vocab=table, merges=[], unk_token="<unk>", byte_fallback=True))  # noqa: S106
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    meta = [decoders.ByteFallback(), decoders.Metaspace("▁", "first")]
    inner.decoder = decoders.Sequence(meta if metaspace else plain)
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")])
    inner.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    inner.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(folder(tmp_path_factory.mktemp("bytes"), vocab=360))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(sentencepiece(folder(tmp_path_factory.mktemp("pieces"), vocab=300)))


def streamed(tokenizer: Tokenizer, ids: list[int], start: bool = True) -> list[str]:
    stream = tokenizer.stream(start)
    return [*map(stream.push, ids), stream.flush()]


def written(tokenizer: Tokenizer, ids: list[int]) -> str:
    return "".join(streamed(tokenizer, ids))


# ---- Text and back ----------------------------------------------------------------------------------------------


@given(text=st.text())
def test_text_comes_back_as_it_went(byte_level: Tokenizer, pieces: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, pieces):
        if not any(token in text for token in ("<s>", "</s>", "<unk>")):
            assert written(tokenizer, tokenizer.encode(text)) == text.replace("▁", " " if tokenizer is pieces else "▁")


@given(ids=st.lists(st.integers(0, 370), max_size=30))
def test_byte_level_ids_read_as_the_library_reads_them(byte_level: Tokenizer, ids: list[int]) -> None:
    assert written(byte_level, ids) == byte_level._inner.decode(ids, skip_special_tokens=True)


LETTERS = st.sampled_from([[3 + byte for byte in letter.encode()] for letter in "é日🎉a "])
WORDS = st.one_of(st.sampled_from([0, 1, 2, *range(259, 270)]).map(lambda token: [token]), LETTERS)


@given(parts=st.lists(WORDS, max_size=12))
def test_sentencepiece_ids_read_as_the_library_reads_them(pieces: Tokenizer, parts: list[list[int]]) -> None:
    ids = [token for part in parts for token in part]
    assert written(pieces, ids) == pieces._inner.decode(ids, skip_special_tokens=True)


@given(ids=st.lists(st.integers(0, 370), max_size=30))
def test_streams_never_hold_half_a_character(byte_level: Tokenizer, pieces: Tokenizer, ids: list[int]) -> None:
    for tokenizer in (byte_level, pieces):
        parts = streamed(tokenizer, ids)
        data = b"".join(map(tokenizer._pieces.of, ids))
        data = data[1:] if tokenizer is pieces and data.startswith(b" ") else data
        assert "".join(parts) == data.decode(errors="replace")


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<▁"), min_size=1), cut=st.integers(0, 50))
def test_a_stream_goes_on_where_the_prompt_ended(pieces: Tokenizer, byte_level: Tokenizer, text: str, cut: int) -> None:
    for tokenizer in (byte_level, pieces):
        ids = tokenizer.encode(text)
        for at, part in enumerate(parts := streamed(tokenizer, ids)):
            assert part.isprintable() or part in text, (at, parts)
        head = next(
            (at for at in range(min(cut, len(ids)), len(ids)) if "\ufffd" not in written(tokenizer, ids[:at])), None
        )
        if head:
            assert written(tokenizer, ids[:head]) + "".join(streamed(tokenizer, ids[head:], start=False)) == text


def test_the_last_byte_brings_the_character(pieces: Tokenizer) -> None:
    ids = [3 + byte for byte in "🎉".encode()]
    assert streamed(pieces, ids) == ["", "", "", "🎉", ""]
    assert streamed(pieces, ids[:3]) == ["", "", "", "\ufffd"]
    the, think = 263, 269
    assert streamed(pieces, [1, the, think, the, 2]) == ["", "the", "<think>", " the", "", ""]
    assert streamed(pieces, [the], start=False) == [" the", ""]


def test_metaspace_tokenizers_are_read_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer(sentencepiece(folder(tmp_path, vocab=300), metaspace=True))
    ids = tokenizer.encode("the cat é")
    assert written(tokenizer, ids) == tokenizer._inner.decode(ids) == "the cat é"


def test_added_tokens_of_any_letters_are_read(tmp_path: Path) -> None:
    path = folder(tmp_path, vocab=400)
    inner = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    inner.add_tokens([AddedToken("<日 b>", normalized=False, special=False)])
    inner.save(str(path / "tokenizer.json"))
    assert written(Tokenizer(path), [400]) == inner.decode([400]) == "<日 b>"


@pytest.mark.parametrize("token", ["<0xZZ>", "<0x 1>", "<0x  >"])
def test_a_token_that_only_looks_like_a_byte_is_text(tmp_path: Path, token: str) -> None:
    path = sentencepiece(folder(tmp_path, vocab=300))
    inner = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    inner.add_tokens([AddedToken(token, normalized=False, special=False)])
    inner.save(str(path / "tokenizer.json"))
    tokenizer = Tokenizer(path)
    assert tokenizer.bytes_of(inner.token_to_id(token)) == token.encode()
    assert tokenizer.bytes_of(inner.token_to_id("<0xC3>")) == b"\xc3"


def test_ends_come_from_all_files(tmp_path: Path) -> None:
    path = folder(tmp_path, eos_token_id=7)
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert Tokenizer(path).eos == (7, 9, 2)
    text = json.loads((path / "tokenizer_config.json").read_text())
    text["eos_token"] = {"content": "<unk>", "__type": "AddedToken"}
    (path / "tokenizer_config.json").write_text(json.dumps(text))
    assert Tokenizer(path).eos == (7, 9, 0)
    (path / "tokenizer_config.json").unlink()
    (path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert Tokenizer(path).eos == (7, 9, 2)


def test_a_files_truncation_and_padding_do_not_count(tmp_path: Path) -> None:
    path = folder(tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=4)
    inner.save(str(path / "tokenizer.json"))
    assert written(Tokenizer(path), Tokenizer(path).encode("longer than four")) == "longer than four"
    assert len(Tokenizer(path).encode("x")) == 1


# ---- What is refused ---------------------------------------------------------------------------------------------


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    path = folder(tmp_path)
    source = (path / "tokenizer.json").read_text()
    for text in ("{", "[]", '{"model": {"type": "BPE"}}', source.replace('"ByteLevel"', '"Magic"'), "\xff"):
        (path / "tokenizer.json").write_text(text, encoding="latin-1" if text == "\xff" else "utf-8")
        with pytest.raises(ModelError, match=r"tokenizer\.json"):
            Tokenizer(path)
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))  # noqa: S106
    words.save(str(path / "tokenizer.json"))
    with pytest.raises(ModelError, match="byte-level BPE and sentencepiece"):
        Tokenizer(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="save_pretrained"):
        Tokenizer(path)
    (path / "tokenizer.json").write_text(source)
    with pytest.raises(ModelError, match="above 99"):
        Tokenizer(path, LlmLimits(max_tokenizer_bytes=99))


def test_text_that_the_model_cannot_read_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    inner.add_special_tokens(["<pad>"])  # id 128, beyond the embedding
    inner.save(str(path / "tokenizer.json"))
    tokenizer = Tokenizer(path)
    with pytest.raises(DataError, match="the model has not"):
        tokenizer.encode("a <pad> b")
    with pytest.raises(DataError, match="Unicode"):
        tokenizer.encode("\ud800")


def test_a_library_that_panics_is_refused(pieces: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3's."""

    class Inner:
        raised: type[BaseException] = PanicException

        def encode_batch(self, *_: object, **__: object) -> None:
            raise self.raised("index out of bounds")

    monkeypatch.setattr(pieces, "_inner", Inner())
    with pytest.raises(DataError, match="index out of bounds"):
        pieces.encode("a")
    monkeypatch.setattr(Inner, "raised", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        pieces.encode("a")


def test_others_run_while_a_text_is_read(byte_level: Tokenizer) -> None:
    go, ran = threading.Event(), threading.Event()

    def other() -> None:
        go.wait()
        ran.set()

    thread, interval_s = threading.Thread(target=other), sys.getswitchinterval()
    thread.start()
    try:
        sys.setswitchinterval(1000)  # it has its turn only where it is let
        go.set()
        for _ in range(300):
            byte_level.encode("the cat " * 500)
            if ran.is_set():
                break
    finally:
        found = ran.is_set()
        sys.setswitchinterval(interval_s)
        thread.join()
    assert found


# ---- Templates ---------------------------------------------------------------------------------------------------


def test_chat_renders_the_folders_template(tmp_path: Path) -> None:
    path = folder(tmp_path)
    wanted = "<s>user: Hi <you> & me</s>\n<s>assistant: Yes</s>\n<s>assistant: "
    assert Tokenizer(path).chat(CHAT) == wanted
    (path / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.role[0] }}{% endfor %}")
    assert Tokenizer(path).chat(CHAT) == "<s>ua"
    (path / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer(path).chat(CHAT) == "yes"


def test_a_model_without_template_says_to_use_completions(tmp_path: Path) -> None:
    tokenizer = Tokenizer(folder(tmp_path, template=None))
    assert written(tokenizer, tokenizer.encode("text works")) == "text works"
    with pytest.raises(ModelError, match="no chat template.*use completions"):
        tokenizer.chat(CHAT)


LOOP, END = "{% for m in messages %}", "{% endfor %}"
FOUND = {
    LOOP + "\n  {{ loop.index }}/{{ loop.length }}{% if loop.last %}!{% endif %}\n" + END: "  1/2  2/2!",
    "{{ messages[0] | tojson }}": '{"role": "user", "content": "Hi <you> & me"}',
    LOOP + "{% if loop.first %}{% continue %}{% endif %}{{ m['content'] }}{% break %}" + END: "Yes",
    "{% set ns = namespace(n=0) %}" + LOOP + "{% set ns.n = ns.n + 1 %}" + END + "{{ ns.n }}": "2",
    "{{ strftime_now('%Y') | int > 2000 }}{{ tools is none }}{{ unheard_of is defined }}": "TrueTrueFalse",
    "{%- for k, v in messages[0].items() %}{{ k }}{{ loop.length }}{% endfor -%}  ": "role2content2",
    "{% macro turn(m) %}[{{ m.content | trim }}]{% endmacro %}" + LOOP + "{{ turn(m) }}" + END: "[Hi <you> & me][Yes]",
}


@pytest.mark.parametrize(("source", "wanted"), FOUND.items())
def test_templates_find_what_hugging_face_gives_them(source: str, wanted: str) -> None:
    assert Template(source).render(CHAT, {}) == wanted


def test_a_template_may_refuse_messages() -> None:
    template = Template("{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(DataError, match="Roles must alternate"):
        template.render(CHAT, {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{{ messages[0]['nothing'].more }}",
        "{{ 1 / 0 }}",
        "{{ range(10000000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        # Without end, without a word written.
        "{% set r = range(9999) | list %}" + "{% for a in r %}" * 4 + "{% endfor %}" * 4,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_hostile_templates_fail_and_leave_the_next_one_alone(source: str) -> None:
    template = Template(source, LlmLimits(max_template_passes=20_000))
    with pytest.raises(ModelError):
        template.render(CHAT, {})
    assert CHAT[0]["role"] == "user"
    assert Template("{{ messages[0].role }}").render(CHAT, {}) == "user"


def test_a_template_that_writes_too_much_is_stopped() -> None:
    template = Template("{% for m in messages %}{{ 'x' * 600 }}{% endfor %}", LlmLimits(max_template_text=1000))
    assert len(template.render(CHAT[:1], {})) == 600
    with pytest.raises(ModelError, match="too much"):
        template.render(CHAT, {})


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ " + "(" * 50_000,
        "{% for a in b %}" * 60 + "{% endfor %}" * 60,
        "x" * (5 << 20),
        "{% for a in [1] recursive %}{% if loop.depth < 4 %}{{ loop(range(100000)) }}{% endif %}{% endfor %}",
    ],
)
def test_templates_that_do_not_compile_are_refused(source: str) -> None:
    with pytest.raises(ModelError, match="use completions"):
        Template(source)


@settings(max_examples=60, deadline=None)
@given(source=st.text(st.sampled_from("{}%-|.()[]'x1 fornidm+*\n"), max_size=40))
def test_any_template_renders_or_is_refused(source: str) -> None:
    try:
        text = Template("{{" + source + "}}").render(CHAT, {"bos_token": "<s>"})
    except (ModelError, DataError):
        return
    assert isinstance(text, str)
