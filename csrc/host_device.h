// LORA_INIT_HD before what kernels call and host tests call too.
#pragma once

#ifdef __CUDACC__
#define LORA_INIT_HD __host__ __device__
#else
#define LORA_INIT_HD
#endif
