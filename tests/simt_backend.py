"""Back end `simt`, for tests alone: the sources of back end `cuda`, run on the CPU by an emulator.

In the compiled library `peft_kernels._C_simt`, which a build with PEFT_KERNELS_EMULATE=1 makes. Nobody but
`testing.register_emulators` puts it among the back ends, and nothing chooses it by itself.
"""

from __future__ import annotations

from peft_kernels.backends.compiled import CompiledBackend


class SimtBackend(CompiledBackend):
    name = "simt"
    namespace = "peft_kernels_simt"
    device_type = "cpu"
    library = "peft_kernels._C_simt"
    not_built = "not built (needs PEFT_KERNELS_EMULATE=1 at installation)"

    def reset(self) -> None:
        """The card that it has at the start."""
        self.extension.set_card(80, 4, 163 << 10)

    def describe(self) -> str:
        return "the CUDA kernels' sources on the CPU, emulated: for tests"


BACKEND = SimtBackend()
