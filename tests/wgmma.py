"""Registers that Hopper's asynchronous products still use, looked for in machine code.

ptxas of CUDA before 13.3 is known to give such registers away too early (Triton's pull request 11781): some
products are then wrong. What it made of a kernel can be looked through without a GPU.
"""

import re

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?)\s*;")
GUARDED = re.compile(r"/\*[0-9a-f]{4,}\*/\s+@!?U?P\w+ ")
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\d+\.\S+ R(\d+), (?:R(\d+), )?gdesc")
# Instructions that write no register, or only predicates, uniform registers and memory.
WRITES_NONE = re.compile(
    r"ST[GSL]?\b|STSM|RED|BAR|EXIT|BR[AX]|SYNCS|MEMBAR|WARP|BSSY|BSYNC|CCTL|U|ERRBAR|FENCE|DEPBAR|NOP|R2UR|LDGSTS"
    r"|LDGDEPBAR|[IFHD]SETP|PLOP3|VOTE|CALL|RET|BREAK|BMOV|YIELD|ELECT|R2P"
)


def written(text):
    """Registers that an instruction writes."""
    if WRITES_NONE.match(text):
        return set()
    name, _, rest = text.partition(" ")
    first = next((part for part in re.split(r",\s*", rest) if not re.match(r"U?P[\dT]", part)), "")
    if not (register := re.match(r"R(\d+)\b", first)):
        return set()
    loads_matrices = re.match(r"LDSM.*\.([24])\b", name)
    wide = ".64" in name or "WIDE" in name or re.match(r"D(ADD|MUL|FMA)", name)
    count = int(loads_matrices[1]) if loads_matrices else 4 if ".128" in name else 2 if wide else 1
    return set(range(int(register[1]), int(register[1]) + count))


def read(text):
    return {int(number) for number in re.findall(r"\bR(\d+)\b", text)}


def hazards(sass):
    """Instructions of one kernel that write what a product under way reads, or touch what it adds into."""
    lines = [(int(at, 16), text) for at, text in INSTRUCTION.findall(sass)]
    guarded = [bool(GUARDED.match(line[0])) for line in re.finditer(INSTRUCTION, sass)]
    place = {at: i for i, (at, _) in enumerate(lines)}

    def following(i):
        text = lines[i][1]
        targets = []
        if jump := re.match(r"BRA\b.*?0x([0-9a-f]+)", text):
            targets = [place[int(jump[1], 16)]] if int(jump[1], 16) in place else []
            if not guarded[i] and not re.match(r"BRA\S* !?U?P\d|BRA\.DIV", text):
                return targets
        elif text.startswith("EXIT") and not guarded[i]:
            return []
        return targets + [i + 1] * (i + 1 < len(lines))

    found = []
    for start, (_, product) in enumerate(lines):
        if not (match := PRODUCT.match(product)):
            continue
        sums = set(range(int(match[2]), int(match[2]) + int(match[1]) // 2))
        operand = set(range(int(match[3]), int(match[3]) + 4)) if match[3] else set()
        # How many groups of products are closed after this one's own, by instruction; -1 before its own is.
        closed = 0 if "gsb0" in product else -1
        seen, ahead = set(), [(i, closed) for i in following(start)]
        while ahead:
            at = i, closed = ahead.pop()
            if at in seen or closed > 8:
                continue
            seen.add(at)
            text = lines[i][1]
            if (wait := re.match(r"WARPGROUP\.DEPBAR\S* gsb0, 0x(\d+)", text)) and closed >= int(wait[1]):
                continue
            if other := PRODUCT.match(text):
                begin = int(other[2])
                if operand & set(range(begin, begin + int(other[1]) // 2)):
                    found.append((product, text))
                closed += "gsb0" in text
            elif written(text) & operand or (written(text) | read(text)) & sums:
                found.append((product, text))
            ahead += [(j, closed) for j in following(i)]
    return found
