// A device guard for CUDA that does nothing, where this build of PyTorch has none: tensors that only
// say that they are on cuda:0 need one.
#include <c10/core/impl/DeviceGuardImplInterface.h>

static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
