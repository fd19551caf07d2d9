"""The processor's instructions, as far as a compiler with -march=native makes use of them.

The names are those of /proc/cpuinfo. Left out are flags that concern the kernel (smep, fpu, mitigations), and
instructions that no compiler generates of its own accord (rdrand, xsavec, clwb, waitpkg): hypervisors mask them at
will, and no kernel of an engine has them.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from .hashes import short_hash

_CPUINFO = Path("/proc/cpuinfo")
_VECTOR_BYTES = Path("/proc/sys/abi/sve_default_vector_length")
# What gcc 14 and clang 18 turn on with -march=native and generate, or select code by (__AVX512F__, __AES__, ...).
_X86 = """
    mmx sse sse2 pni ssse3 sse4_1 sse4_2 sse4a avx avx2 fma fma4 xop f16c
    cx16 lahf_lm popcnt abm bmi1 bmi2 tbm adx movbe 3dnow 3dnowext 3dnowprefetch
    aes pclmulqdq vaes vpclmulqdq gfni sha_ni sha512 sm3 sm4
    avx512f avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 avx512_vnni
    avx512_bitalg avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_vp2intersect avx512_bf16 avx512_fp16
    avx_vnni avx_vnni_int8 avx_vnni_int16 avx_ifma avx_ne_convert avx10 avx10_1 avx10_2
    amx_tile amx_int8 amx_bf16 amx_fp16 amx_complex cmpccxadd apx_f
"""
_ARM = """
    fp asimd aes pmull sha1 sha2 sha3 sha512 sm3 sm4 crc32 atomics fphp asimdhp asimdrdm jscvt fcma lrcpc ilrcpc
    asimddp asimdfhm i8mm bf16 frint flagm flagm2 paca pacg rpres lse128 lrcpc3 mops cssc
    sve sve2 sve2p1 sveaes svepmull svebitperm svesha3 svesm4 svei8mm svef32mm svef64mm svebf16 sveb16b16
    sme sme2 smef16f16 smei16i64 smef64f64
"""
_KNOWN = frozenset(f"{_X86} {_ARM}".split())
_WIDEST = ("amx_tile", "avx512f", "avx2", "sve2", "sve", "asimd")
_FLAGS = re.compile(r"^(?:flags|Features)\s*:\s*(.*)$", re.MULTILINE)
# RISC-V, POWER and z name the processor or its extensions in one line.
_NAME = re.compile(r"^(?:isa|cpu|features)\s*:\s*(.*)$", re.MULTILINE)


@cache
def instruction_set() -> str:
    """The instructions of this machine, as :func:`describe` has them; "unknown" where the kernel does not tell."""
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        return "unknown"
    try:
        vector = _VECTOR_BYTES.read_text().strip()
    except OSError:
        vector = ""
    return describe(text, vector)


def describe(cpuinfo: str, vector_bytes: str = "") -> str:
    """The widest vectors by name, and a hash of all instructions that compiled code may use.

    Args:
        cpuinfo: text of /proc/cpuinfo. Of several processors the first counts: the kernel tells what all can do.
        vector_bytes: length of SVE's vectors, which compilers may fix.
    """
    found = _FLAGS.search(cpuinfo)
    if found is None:
        name = _NAME.search(cpuinfo)
        return f"base+{short_hash(name[1].strip())}" if name else "unknown"
    flags = sorted(_KNOWN.intersection(found[1].split()))
    widest = next((name for name in _WIDEST if name in flags), "base")
    length = [f"sve={vector_bytes}"] if "sve" in flags and vector_bytes else []
    return f"{widest}+{short_hash(*flags, *length)}"
