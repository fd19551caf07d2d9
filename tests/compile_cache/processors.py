"""Texts of /proc/cpuinfo, shortened to one processor and the lines that count."""

_COMMON = (
    "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 ht syscall nx "
    "pdpe1gb rdtscp lm constant_tsc rep_good nopl cpuid pni pclmulqdq ssse3 fma cx16 pcid sse4_1 sse4_2 x2apic movbe "
    "popcnt aes xsave avx f16c rdrand lahf_lm abm 3dnowprefetch fsgsbase bmi1 avx2 smep bmi2 erms invpcid avx512f "
    "avx512dq rdseed adx smap avx512ifma clflushopt clwb avx512cd sha_ni avx512bw avx512vl xsaveopt xsavec xgetbv1 "
    "xsaves avx512_bf16 avx512vbmi umip pku ospke avx512_vbmi2 gfni vaes vpclmulqdq avx512_vnni avx512_bitalg "
    "avx512_vpopcntdq rdpid fsrm"
)
_INTEL = (
    "acpi ss tm pbe art arch_perfmon pebs bts dtes64 monitor ds_cpl vmx smx est tm2 xtpr pdcm dca cat_l3 cat_l2 cdp_l3 "
    "ibrs ibpb stibp tsc_adjust rtm cqm rdt_a intel_pt avx_vnni dtherm ida arat pln pts hwp waitpkg tme la57 "
    "bus_lock_detect cldemote movdiri movdir64b enqcmd md_clear serialize tsxldtrk pconfig amx_bf16 avx512_fp16 "
    "amx_tile amx_int8 flush_l1d arch_capabilities"
)
_AMD = (
    "mmxext fxsr_opt aperfmperf monitor cmp_legacy svm extapic cr8_legacy sse4a misalignsse osvw ibs skinit wdt tce "
    "topoext perfctr_core perfctr_nb bpext perfctr_llc mwaitx cpb cat_l3 cdp_l3 ibrs ibpb stibp vmmcall cqm rdt_a "
    "clzero irperf xsaveerptr rdpru wbnoinvd amd_ppin arat npt lbrv svm_lock nrip_save avic v_vmsave_vmload vgif la57 "
    "overflow_recov succor smca flush_l1d"
)


def cpuinfo(flags: str, name: str = "flags") -> str:
    return f"processor\t: 0\nfpu\t\t: yes\ncpu MHz\t\t: 2299.998\n{name}\t\t: {flags}\nbugs\t\t: spectre_v1\n"


SAPPHIRE_RAPIDS = cpuinfo(f"{_COMMON} {_INTEL}")
GENOA = cpuinfo(f"{_COMMON} {_AMD}")
_HIDDEN_IN_GUESTS = {"rdrand", "rdseed", "waitpkg", "enqcmd", "vmx", "intel_pt", "xsaves", "smep", "rtm", "pku", "clwb"}
SAPPHIRE_RAPIDS_GUEST = cpuinfo(
    " ".join(flag for flag in f"{_COMMON} {_INTEL} hypervisor".split() if flag not in _HIDDEN_IN_GUESTS)
)
"""The same processor as a hypervisor shows it."""
GRAVITON3 = cpuinfo(
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 "
    "sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs paca pacg dcpodp svei8mm svebf16 i8mm bf16 dgh rng",
    "Features",
)
