"""The texts on which two tokenizers must agree: what tokenizers are known to stumble over.

A converter that overlooks a pre-tokenizer, a merge or an added token gives a model
ids it was never trained on, without any error. Each group below is one way in which
that has happened: digits (split one by one, in threes, or not at all), runs of
blanks, special tokens written as text, scripts without spaces, marks that combine,
characters that a normalizer drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

__all__ = ["HARD_STRINGS", "hard_strings"]

_ADDED_AT_MOST = 48  # added tokens of one model that are tried; some have thousands of reserved ones
_WORDS = (
    "a",
    "Hello",
    "Hello world",
    " Hello",
    "hello WORLD HeLLo",
    "The quick brown fox jumps over the lazy dog.",
    "I'm you're he'll we've they'd it's DON'T Can't y'all'd've",
    "it’s the ‘curly’ “kind” of quote",
    "well-known co-operate e-mail --- – — ― …",
    "U.S.A. e.g. i.e. Ph.D. 3rd No.1",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
    "don't  stop   believing    now",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "Donaudampfschifffahrtsgesellschaftskapitän",
    "naïve café résumé Ångström façade Zürich",
    "?!?! ... ,,, ;;; ::: ((( ))) [[[ ]]] {{{ }}}",
    "a.b,c;d:e!f?g",
    "#hashtag @mention $100 50% 5‰ A&B a*b a^b ~x |y| \\z `q`",
    "yes/no and/or 1/2 w/o",
    "«guillemets» „deutsch“ ¿qué? ¡hola!",
)
_DIGITS = (
    *("7" * n for n in (1, 2, 3, 4, 5, 6, 7, 8, 12, 33)),
    "1234567890",
    "0001 0010 0100",
    "3.14159265358979",
    "1,234,567.89",
    "-42 +7 ±3 −5",
    "1e-10 6.022E23 0x1F 0b1010 0o17",
    "2024-05-06T07:08:09Z",
    "12:34:56 and 99:99",
    "+41 44 123 45 67",
    "10 000 000",
    "v1.2.3-rc4+build5",
    "a1b2c3 x9y8 R2D2",
    "1st 2nd 3rd 4th",
    "½ ¼ ² ³ ₁ ₂ ① ⑩ Ⅳ",
    "٠١٢٣٤٥٦٧٨٩ ०१२३ ௧௨௩ １２３",
    "192.168.0.1:8080",
    "(1+2)*3/4-5%6==0",
)
_BLANKS = (
    "",
    " ",
    "  ",
    "   ",
    *(" " * n for n in (4, 7, 8, 16, 31, 64)),
    "\n",
    "\n\n",
    "\n\n\n\n\n",
    "\t",
    "\t\t\t",
    "\r\n",
    "\r",
    " \n \n ",
    "\n \t \r\n",
    "a b",
    "a  b",
    "a   b",
    "a\nb",
    "a\n\nb",
    "a \n b",
    "a\tb\t\tc",
    "a\r\nb\r\nc",
    " leading",
    "  leading two",
    "trailing ",
    "trailing two  ",
    "trailing line\n",
    "trailing lines\n\n",
    "    four\n        eight\n\ttab",
    "no\u00a0break",
    "thin\u2009hair\u200aideographic\u3000space",
    "em\u2003en\u2002figure\u2007narrow\u202f",
    "line\u2028paragraph\u2029separator",
    "next\u0085line vertical\x0btab form\x0cfeed",
    "\u00a0\u00a0\u00a0",
    " a  b   c    d     e      f",
)
_EMOJI = (
    "🙂",
    "🙂🙃😀😂🤣",
    "a🙂b",
    " 🙂 ",
    "👍🏽 👩🏿‍🚀",
    "👨‍👩‍👧‍👦 family",
    "🏳️‍🌈 🏴‍☠️",
    "🇨🇭🇯🇵🇧🇷",
    "❤️ vs ❤ vs ♥",
    "1️⃣ 2️⃣ #️⃣",
    "🦜🪿🫠🫨",
    "(╯°□°)╯︵ ┻━┻",
    "→ ⇒ ∀x∈ℝ ∃y: x≤y ∧ ¬z ∑∏∫√∞",
    "★☆✓✗✦❖ ▁▂▃▄▅▆▇█",
    "𝕳𝖊𝖑𝖑𝖔 𝓦𝓸𝓻𝓵𝓭 𝟙𝟚𝟛",
    "Ｆｕｌｌ　ｗｉｄｔｈ",
)
_SCRIPTS = (
    "日本語テキスト",
    "これは日本語の文章です。東京タワーは333メートル。",
    "カタカナ ｶﾀｶﾅ ひらがな",
    "中文文本,没有空格。标点符号“引号”!",
    "繁體中文與简体中文",
    "한국어 텍스트입니다. 띄어쓰기가 있다.",
    "한글",
    "中英mixed文字123混合",
    "مرحبا بالعالم",
    "السَّلَامُ عَلَيْكُمْ",
    "שלום עולם",
    "שָׁלוֹם with נִקּוּד",
    "abc مرحبا 123 שלום xyz",
    "\u202bright to left\u202c",
    "a\u200fb\u200ec",
    "Привет, мир! Ёлка и ъ.",
    "Γειά σου Κόσμε, ΣΊΣΥΦΟΣ ς",
    "नमस्ते दुनिया क्षत्रिय",
    "বাংলা লেখা",
    "தமிழ் எழுத்து",
    "ภาษาไทยไม่มีช่องว่าง",
    "ພາສາລາວ ខ្មែរ မြန်မာ",
    "ქართული ენა Հայերեն",
    "አማርኛ",
    "Tiếng Việt có dấu: ế ổ ữ ặ",
    "Íslenska þ ð æ Ø å ß ſ ı İ",
    "ⵜⴰⵎⴰⵣⵉⵖⵜ ᚠᚢᚦ ᏣᎳᎩ",
    "𐍈𐌰𐌹 𓀀𓁐 𒀀",
    "ꙮ",
    "Zażółć gęślą jaźń",
)
_MARKS = (
    "e\u0301",
    "cafe\u0301",
    "\u00e9 e\u0301 \u0065\u0301\u0300",
    "a\u030a \u212b \u00c5",
    "n\u0303o n\u0303",
    "\u1100\u1161\u11a8",
    "Z\u0351\u0346\u0306a\u0321\u0323l\u0335\u033ag\u0338\u0349o\u0322\u0355",
    "\u0301 alone",
    "o\u0308\u0323 order",
    "ﬁ ﬂ ﬀ ligatures ĳ ǆ",
    "zero\u200bwidth\u200cnon\u200djoiner",
    "word\u2060joiner soft\u00adhyphen",
    "variation\ufe0e selector\ufe0f",
    "\ufeffbyte order mark",
    "mid\ufeffbom",
)
_CONTROL = (
    "\x00",
    "a\x00b",
    "\x01\x02\x03",
    "\x07bell\x08back",
    "\x1b[31mred\x1b[0m",
    "\x7f",
    "\x80\x9f",
    "\ufffd",
    "\ufffe\uffff",
    "\U000f0000\U0010ffff",
    "\ue000\uf8ff private",
    "▁",
    "▁▁ meta ▁space",
    "Ġ",
    "ĠHello Ċ ĉ",
    "<0x0A> <0xFF>",
    "\\n \\t \\u0041",
)
_SPECIAL = (
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<mask>",
    "<bos>",
    "<eos>",
    "[INST] hi [/INST]",
    "[CLS] x [SEP]",
    "<<SYS>>\nsystem\n<</SYS>>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "text<|im_end|>text",
    "<|endoftext|>",
    "a <|endoftext|> b",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "<|user|>\nhi<|end|>\n<|assistant|>",
    "<|im_start|",
    "|im_end|>",
    "< |im_end| >",
    "<|IM_END|>",
    "<|im_end|><|im_end|>",
    "<think>\n\n</think>\n\n",
    "<tool_call>\n{}\n</tool_call>",
    "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
    "<ans>True</ans>",
    "<Question_4><input>x</input><target>y</target></Question_4>",
)
_CODE = (
    "def f(x: int) -> int:\n    return x**2  # square\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * c; }",
    "if(a&&b||!c){return;}",
    "SELECT * FROM t WHERE a >= 1 AND b <> 'x';",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b"}}',
    '<div class="a b">text &amp; more</div><!-- c -->',
    "import numpy as np\n\n\nclass A(B):\n\t'''doc'''\n\tpass",
    "https://example.org/a/b?c=d&e=%20f#g",
    "user.name+tag@sub.example.co.uk",
    "C:\\Users\\x\\file.txt /usr/local/bin/../lib",
    "$ pip install 'a[b]>=1.0,<2' && echo \"$HOME\"",
    "x = y if z else [w for w in v if w != u]",
    "\\begin{equation} \\frac{a}{b} \\end{equation}",
    "| a | b |\n|---|:-:|\n| 1 | 2 |",
    "# Title\n\n- item\n  - nested\n1. one\n\n```python\nprint(1)\n```",
    "a=1;b=2;c=a+b;d=[a,b,c];e={a:b}",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "0" * 8 + "\t" + "=" * 40 + "\n" + "-" * 33,
)
_LONG = (
    "a" * 100,
    "ab" * 300,
    "Abc1" * 120,
    "x" * 1000,
    "é" * 150,
    "漢" * 200,
    "🙂" * 60,
    "-" * 257,
    "word" * 64 + " " + "word" * 64,
    "lorem ipsum dolor sit amet " * 24,
    "ACGT" * 128,
    "QmFzZTY0IGVuY29kZWQgc3RyaW5nIHRoYXQgaXMgbG9uZw==" * 4,
    "supercalifragilisticexpialidocious" * 8,
    " ".join(str(n * n) for n in range(60)),
)
HARD_STRINGS: tuple[str, ...] = tuple(
    dict.fromkeys(chain(_WORDS, _DIGITS, _BLANKS, _EMOJI, _SCRIPTS, _MARKS, _CONTROL, _SPECIAL, _CODE, _LONG))
)


def hard_strings(added: Sequence[str] = ()) -> tuple[str, ...]:
    """Return `HARD_STRINGS`, then each of the model's `added` tokens alone, inside a word and between blanks.

    Of a model with many added tokens the first and the last are taken: the reserved
    ones between them are alike.
    """
    half = _ADDED_AT_MOST // 2
    chosen = tuple(added) if len(added) <= _ADDED_AT_MOST else (*added[:half], *added[-half:])
    placed = (
        text for token in chosen for text in (token, f"a{token}b", f"one {token} two", f"{token}\n{token}")
    )
    return tuple(dict.fromkeys(chain(HARD_STRINGS, placed)))
