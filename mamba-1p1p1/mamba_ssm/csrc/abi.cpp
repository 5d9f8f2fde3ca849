// Which headers the library was built from: the SHA-256 of csrc/*_abi.h, from which Python reads the structs.
extern "C" __attribute__((visibility("default"))) const char *kernel_abi() { return KERNEL_ABI; }
