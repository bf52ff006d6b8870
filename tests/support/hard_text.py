"""Texts on which tokenizers with slightly different rules disagree."""

# ruff: noqa: RUF001  # letters that look like others are the point

from __future__ import annotations

__all__ = ["HARD_PAGE", "HARD_TEXT"]

HARD_TEXT = (
    "Plain words, don't we'll I'M. 12345 3.14159 1,000,000 ½ ² ①② ١٢٣ \uff11\uff12\n\n\n  two  spaces\ttabs \r\n"
    "café cafe\u0301 naïve Zoë 漢字かな 한국어 🙂👩‍👩‍👧\u200b x=1;y+=22 //// ((a[b]{c})) CamelCaseWORDS snake_case"
    "   \n trailing  "
)

_CODE = """
@dataclass(frozen=True)
class Head:
\tlayer: int  # 0-based
    head: int = -1

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head:02d}"  \t


if __name__ == "__main__":
    print("\\n".join(f"{i:>3}|{2**i:#010x}" for i in range(0, 1_024, 7)))
#include <stdint.h>
for (uint8_t i = 0; i < 0xFFu; ++i) { a[i] ^= ~b[i] >> 3; } // no_semicolon;;
SELECT COUNT(*) FROM "t" WHERE x <> 'it''s' AND y >= 1e-5;
"""

_TABLE = """
| name      | 2023   | 2024    |  Δ %   |
|:----------|-------:|--------:|:------:|
| *alpha*   |  1 234 | 12.345,6|  +0.05 |
| `beta`    |    007 | –       | −12½   |
+-----------+--------+---------+--------+
"""

_SCRIPTS = (
    "Ελληνικά: Ὀδυσσεύς. Русский текст, ёлка, №5. עִבְרִית שָׁלוֹם. العربيّة: مرحبًا ۱۲۳. हिन्दी १२३ में क्षत्रिय. "
    "ภาษาไทยไม่มีช่องว่าง ๔๕๖. 日本語のテスト、「引用」。简体中文，繁體中文！ 조합형 \u1112\u1161\u11ab. "
    "Tiếng Việt: Nguyễn. İstanbul'da ıSIRGAN. Straße ẞ ǅ ﬁ ﬂ ₂ ⅷ Ⅻ. 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 ٤٥٦ ৭৮৯ ௧௨௩ \u0e51\u0e52. "
    "🇫🇷🇯🇵 👍🏽 ❤️ ☃️ \U0001f9d1\u200d\U0001f680."
)

_LOOK_ALIKES = (
    "<|im_start|>user\nNot a turn<|im_end|>\n<|im_start |> <|im_end|<|im_end|>> <| im_start|> "
    "<|endoftext|><|endoftext|> x<|endoftext|>y <|END|> <repo_name>a/b<file_sep><filename>c.py<gh_stars>10-100 "
    "<issue_start><empty_output> <s></s><bos><eos><pad><unk> <start_of_turn>user\nno<end_of_turn> [INST] [/INST] "
    "<0x0A> <unused0> ▁ ▁▁a"
)

_SPACES = (
    " one  two   three    four\n\nfour\n\n\n\nsix\r\n\r\nwindows\r\rmac\t\t\ttabs \t \tmixed\x0b\x0cforms"
    "\u00a0no-break\u2003em\u3000ideographic\u2028line\u2029paragraph\ufeffmark\u00adsoft"
    + " " * 37
    + "end"
    + "\n" * 19
    + " "
)

_DIGITS = (
    "0 00 000 0000 1234567890 v1.2.3-rc4 2024-02-29T23:59:60Z +49(0)30/123-45 3,141.59 1e10 0b1010 ½ ¼ ⅔ x² y³ ①⑳ ㊷ "
    "١٢٣٤ ۴۵۶ १२३ ১২৩ ௧௨ ๑๒๓ ０１２ 一二三 Ⅳ ⅳ 𝟎𝟏 \U0001d7ff 5th 42nd "
    "abc123def don't'2s I'll'VE we'RE o'clock 'tis 'S's"
)

HARD_PAGE = "\n".join((HARD_TEXT, _CODE, _TABLE, _SCRIPTS, _LOOK_ALIKES, _SPACES, _DIGITS))
"""Code, a table, several scripts, names of control tokens, white space, and digits, after :data:`HARD_TEXT`."""
