// What every launch checks first. A failed check throws, and Python gets a ValueError (bad input)
// or a RuntimeError (CUDA) that names the op and the value.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace lora_init {

template <typename... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// check(M >= 0, "lora_linear: M must be at least 0, got ", M)
template <typename... Parts>
void check(bool right, const Parts&... message) {
  if (!right) throw std::invalid_argument(joined(message...));
}

// Also for what an earlier, asynchronous launch left behind: the next call that returns it names
// it.
inline void check_cuda(cudaError_t status, const char* op) {
  if (status != cudaSuccess)
    throw std::runtime_error(
        joined(op, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status)));
}

// A device address, on `device` and aligned. Throws where it is neither: a kernel would fault, or
// read another device's memory over the bus.
inline void check_pointer(const void* pointer, int device, size_t alignment, const char* op,
                          const char* name) {
  cudaPointerAttributes found{};
  check_cuda(cudaPointerGetAttributes(&found, pointer), op);
  check(found.type == cudaMemoryTypeDevice || found.type == cudaMemoryTypeManaged, op, ": ", name,
        " is not in device memory");
  check(found.device == device, op, ": ", name, " is on device ", found.device, ", expected ",
        device);
  check(reinterpret_cast<uintptr_t>(pointer) % alignment == 0, op, ": ", name, " at ", pointer,
        " is not aligned to ", alignment, " bytes");
}

// Makes `device` current inside a scope.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check_cuda(cudaGetDevice(&previous_), op);
    check_cuda(cudaSetDevice(device), op);
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace lora_init
