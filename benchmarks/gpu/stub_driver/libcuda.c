/* A CUDA driver without a GPU. It answers Triton's own driver code as an H100 would; kernels do nothing.

A kernel's handle is what its cubin says of its parameters. Launches are counted. `stub_record` gives a buffer, to
which each is appended: int32 grid[3], block[3], shared bytes, parameter bytes; uint64 stream, function; then
the parameters. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PARAMETERS = 512 };
typedef struct { int count; uint16_t offset[MAX_PARAMETERS], size[MAX_PARAMETERS]; } Kernel;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned num_attributes;
} Config;

static long launches;
static unsigned char *buffer;
static long capacity, used;

int stub_registers = 128; /* of a thread, in every kernel */

long stub_launches(void) { return launches; }
long stub_recorded(void) { return used; }
void stub_record(void *memory, long bytes) { buffer = memory, capacity = bytes, used = 0; }

int cuLaunchKernelEx(const Config *config, Kernel *kernel, void **parameters, void **extra) {
  __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED);
  if (!buffer) return 0;
  int bytes = kernel->count ? kernel->offset[kernel->count - 1] + kernel->size[kernel->count - 1] : 0;
  const unsigned *grid = config->grid, *block = config->block;
  unsigned header[8] = {grid[0], grid[1], grid[2], block[0], block[1], block[2], config->shared, bytes};
  uint64_t handles[2] = {(uint64_t)config->stream, (uint64_t)kernel};
  long length = sizeof header + sizeof handles + bytes;
  if (used + length > capacity) return 2; /* out of memory */
  memcpy(buffer + used, header, sizeof header);
  memcpy(buffer + used + sizeof header, handles, sizeof handles);
  unsigned char *packed = buffer + used + sizeof header + sizeof handles;
  memset(packed, 0, bytes);
  for (int i = 0; i < kernel->count; i++) memcpy(packed + kernel->offset[i], parameters[i], kernel->size[i]);
  used += length;
  return 0;
}

/* An ELF64 file ends with its section headers. 04 17 0c 00 and 12 bytes hold a parameter's ordinal, offset, size. */
int cuModuleLoadData(Kernel **module, const unsigned char *image) {
  uint64_t headers;
  uint16_t header_size, header_count;
  memcpy(&headers, image + 40, 8), memcpy(&header_size, image + 58, 2), memcpy(&header_count, image + 60, 2);
  const unsigned char *end = image + headers + header_size * header_count;
  Kernel *kernel = calloc(1, sizeof *kernel);
  for (const unsigned char *at = image; at + 16 <= end; at += 4) {
    if (memcmp(at, "\x04\x17\x0c\x00", 4)) continue;
    uint16_t ordinal, offset;
    uint32_t bits;
    memcpy(&ordinal, at + 8, 2), memcpy(&offset, at + 10, 2), memcpy(&bits, at + 12, 4);
    if (ordinal >= MAX_PARAMETERS) return 1;
    kernel->offset[ordinal] = offset, kernel->size[ordinal] = bits >> 18;
    if (ordinal >= kernel->count) kernel->count = ordinal + 1;
  }
  *module = kernel;
  return 0;
}
int cuModuleGetFunction(Kernel **function, Kernel *module, const char *name) { return *function = module, 0; }

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? stub_registers : 0; /* threads of a block, registers of one */
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  static const int H100[][2] = {
      {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}, {8, 49152}, {10, 32},
      {12, 65536}, {13, 1980000}, {16, 132}, {36, 2619000}, {37, 5120}, {38, 52428800}, {39, 2048}, {75, 9},
      {76, 0}, {81, 233472}, {82, 65536}, {97, 232448}, {106, 32},
  };
  *value = 0;
  for (unsigned i = 0; i < sizeof H100 / sizeof *H100; i++)
    if (H100[i][0] == attribute) *value = H100[i][1];
  return 0;
}

int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) { return *value = pointer, 0; }
int cuGetErrorString(int code, const char **text) { return *text = "refused by the stub driver", 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuCtxGetCurrent(void **context) { return *context = &launches, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &launches, 0; }
int cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *kernel, void *config) { return *clusters = 132, 0; }
int cuInit(unsigned flags) { return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
/* A map of 128 bytes is its address, its sizes and its pitches, then zeros. */
int cuTensorMapEncodeTiled(uint64_t *map, int dtype, unsigned rank, uint64_t address, const uint64_t *sizes,
                           const uint64_t *pitches) {
  memset(map, 0, 128);
  map[0] = address;
  memcpy(map + 1, sizes, rank * 8), memcpy(map + 1 + rank, pitches, (rank - 1) * 8);
  return 0;
}
int cuTensorMapEncodeIm2col(void *map) { return 0; }
