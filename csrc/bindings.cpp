// lora_init._C: what Python calls. Pointers and streams come as integers, so nothing of torch is
// needed here; which call a kernel can take is decided in lora_init/backends/cuda.py.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.attr("archs") = LORA_INIT_CUDA_ARCHS;
  m.attr("cuda_version") = LORA_INIT_CUDA_VERSION;
}
