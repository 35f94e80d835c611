// What every launch checks first. A failed check throws, and Python gets a ValueError (bad input)
// or a RuntimeError (CUDA) that names the op and the value.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

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

// Why the driver cannot run what this was compiled for, or nothing.
inline std::optional<std::string> why_old_driver() {
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  if (driver < CUDART_VERSION / 1000 * 1000)
    return joined("needs a driver for CUDA ", CUDART_VERSION / 1000, ", this one is for ",
                  driver / 1000, ".", driver % 1000 / 10);
  return std::nullopt;
}

// Why a device cannot run what is compiled for sm_90a, or nothing.
inline std::optional<std::string> why_no_hopper(int device) {
  if (const auto reason = why_old_driver()) return reason;
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
             "cudaDeviceGetAttribute");
  if (major != 9 || minor != 0)
    return joined("needs compute capability 9.0 (H100, H200), this device has ", major, ".", minor);
  return std::nullopt;
}

inline void check_hopper(int device, const char* op) {
  const auto reason = why_no_hopper(device);
  check(!reason, op, ": ", reason.value_or(""));
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

// Makes `device` current inside a scope. Where it is already, nothing is set: cudaSetDevice makes a
// context, which on a GPU that nobody uses is half a gigabyte.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) : device_(device) {
    check_cuda(cudaGetDevice(&previous_), op);
    if (previous_ != device_) check_cuda(cudaSetDevice(device_), op);
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  const int device_;
  int previous_ = 0;
};

}  // namespace lora_init
