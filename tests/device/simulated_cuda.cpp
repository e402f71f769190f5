// A device of the type "cuda" for a CPU build of PyTorch. Its memory is host memory, its kernels are those of the CPU.
//
// As on a GPU, an operator that gets tensors of two devices raises an error, by the rules of native_functions.yaml.
// Memory is counted and limited for each device. Python is told of every copy between devices and of every operator whose
// result the host waits for. Not simulated: asynchrony, speed, and the rounding of GPU kernels.
#include <torch/extension.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>

namespace {

using c10::Device, c10::DeviceIndex, c10::Storage, c10::StorageImpl;
using StoragePointer = c10::intrusive_ptr<StorageImpl>;

constexpr int kMostDevices = 16;

int device_count() {
  static const int count = [] {
    const char* value = std::getenv("SIMULATED_CUDA_DEVICES");
    return value ? std::max(1, std::min(kMostDevices, std::atoi(value))) : 1;
  }();
  return count;
}

thread_local DeviceIndex current = 0;

struct WithDevice {  // makes a device the current one while it exists
  DeviceIndex before = current;
  explicit WithDevice(std::optional<Device> device) {
    if (!device || device->index() < 0) return;
    TORCH_CHECK(device->index() < device_count(), "CUDA error: invalid device ordinal (simulated)");
    current = device->index();
  }
  ~WithDevice() { current = before; }
};

// ---- Memory

struct Memory {
  std::atomic<int64_t> used{0}, peak{0}, total{INT64_C(80) << 30};

  void take(int device, int64_t bytes) {
    const int64_t now = used.fetch_add(bytes) + bytes;
    if (now > total) {
      used.fetch_sub(bytes);
      TORCH_CHECK_WITH(
          OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes. GPU ", device,
          " has a total capacity of ", total.load(), " bytes of which ", total - (now - bytes), " are free. (simulated)");
    }
    int64_t most = peak;
    while (now > most && !peak.compare_exchange_weak(most, now)) {
    }
  }
};
Memory& memory(int device) {
  static Memory* all = new Memory[kMostDevices];
  return all[device];
}

// A storage of the device holds a storage of the CPU with the same bytes. Where an operator runs, the storage of the CPU
// that stands in for one of the device holds that one: the bytes are freed when neither is in use.
struct Held {
  StoragePointer on_cpu;
  int device;
  int64_t bytes;
};
void release_held(void* context) {
  auto* held = static_cast<Held*>(context);
  memory(held->device).used.fetch_sub(held->bytes);
  delete held;
}
void release_reference(void* context) { delete static_cast<StoragePointer*>(context); }

c10::DataPtr device_pointer(StoragePointer on_cpu, int device) {
  const int64_t bytes = on_cpu->nbytes();
  memory(device).take(device, bytes);
  void* data = on_cpu->mutable_data();
  return {data, new Held{std::move(on_cpu), device, bytes}, &release_held, Device(c10::kCUDA, device)};
}

struct DeviceAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, Device(c10::kCUDA, current)};
    auto on_cpu = c10::make_intrusive<StorageImpl>(
        StorageImpl::use_byte_size_t(), bytes, c10::GetCPUAllocator()->allocate(bytes), nullptr, false);
    std::memset(on_cpu->mutable_data(), 0xFF, bytes);  // uninitialised memory is NaN
    return device_pointer(std::move(on_cpu), current);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceAllocator& device_allocator() {
  static auto* allocator = new DeviceAllocator();
  return *allocator;
}

Storage device_storage(const Storage& on_cpu, int device) {
  auto pointer = device_pointer(StoragePointer::reclaim_copy(on_cpu.unsafeGetStorageImpl()), device);
  return c10::make_intrusive<StorageImpl>(
      StorageImpl::use_byte_size_t(), on_cpu.nbytes(), std::move(pointer), &device_allocator(), true);
}
Storage stand_in_storage(const Storage& on_device) {
  auto* reference = new StoragePointer(StoragePointer::reclaim_copy(on_device.unsafeGetStorageImpl()));
  c10::DataPtr pointer(on_device.mutable_data(), reference, &release_reference, Device(c10::kCPU));
  return c10::make_intrusive<StorageImpl>(
      StorageImpl::use_byte_size_t(), on_device.nbytes(), std::move(pointer), c10::GetCPUAllocator(), true);
}

// Pinned memory: the first byte of every allocation, and how many there are.
std::mutex pinned_mutex;
std::map<const char*, size_t>& pinned() {
  static auto* all = new std::map<const char*, size_t>();
  return *all;
}
void release_pinned(void* data) {
  {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned().erase(static_cast<const char*>(data));
  }
  std::free(data);
}
bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto after = pinned().upper_bound(static_cast<const char*>(data));
  if (after == pinned().begin()) return false;
  auto [start, bytes] = *std::prev(after);
  return static_cast<const char*>(data) < start + bytes;
}
struct PinnedAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    TORCH_CHECK(!bytes || !posix_memalign(&data, 64, bytes), "no pinned memory");
    std::lock_guard<std::mutex> lock(pinned_mutex);
    if (data) pinned()[static_cast<const char*>(data)] = bytes;
    return {data, data, &release_pinned, Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

// ---- What Python is told: a kind (h2d, d2h, p2p, wait), the operator, bytes

PyObject* listener = nullptr;

void tell(const char* kind, const std::string& op, int64_t bytes) {
  if (!listener || !Py_IsInitialized()) return;
  pybind11::gil_scoped_acquire gil;
  PyObject* result = PyObject_CallFunction(listener, "ssL", kind, op.c_str(), static_cast<long long>(bytes));
  if (!result) throw pybind11::error_already_set();
  Py_DECREF(result);
}

// ---- Which operators accept what

using Names = std::unordered_set<std::string>;

// Accept scalars of the CPU; these have `device_check: NoCheck` in native_functions.yaml.
Names& accepting_scalars() {
  static auto* names = new Names();
  return *names;
}
// Accept indices of the CPU, which they copy.
const Names kAcceptingIndices{
    "aten::index.Tensor",          "aten::index.Tensor_out",    "aten::index_put_",          "aten::index_put",
    "aten::_index_put_impl_",      "aten::_unsafe_index.Tensor", "aten::_unsafe_index_put"};
// The host learns a value or a size from these, and waits for it.
const Names kWaiting{
    "aten::_local_scalar_dense", "aten::equal",        "aten::nonzero",
    "aten::masked_select",       "aten::_unique2",     "aten::unique_dim",
    "aten::unique_consecutive",  "aten::bincount",     "aten::repeat_interleave.Tensor",
    "aten::_linalg_eigh",        "aten::linalg_eig",   "aten::multinomial"};

std::string name_of(const c10::FunctionSchema& schema) {
  return schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name();
}

// ---- Every operator without a kernel below: it runs on the CPU, on stand-ins that share the memory of its arguments

at::Tensor tensor_over(const Storage& storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}

struct Call {
  std::unordered_map<StorageImpl*, Storage> to_cpu, to_device;
  std::unordered_map<StorageImpl*, c10::DispatchKeySet> keys;
  std::vector<at::Tensor> of_device, of_cpu, cpu_indices;
  Device device{c10::kCUDA, -1};

  at::Tensor stand_in(const at::Tensor& tensor, bool is_index = false) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      (is_index ? cpu_indices : of_cpu).push_back(tensor);
      return tensor;
    }
    of_device.push_back(tensor);
    if (device.index() < 0) device = tensor.device();
    auto* key = tensor.storage().unsafeGetStorageImpl();
    auto found = to_cpu.find(key);
    if (found == to_cpu.end()) {
      found = to_cpu.emplace(key, stand_in_storage(tensor.storage())).first;
      to_device.emplace(found->second.unsafeGetStorageImpl(), tensor.storage());
      keys.emplace(found->second.unsafeGetStorageImpl(), tensor.key_set());
    }
    return tensor_over(found->second, c10::DispatchKey::CPU, tensor);
  }

  Storage storage_of(const at::Tensor& on_cpu) {
    auto* key = on_cpu.storage().unsafeGetStorageImpl();
    auto found = to_device.find(key);
    if (found == to_device.end()) found = to_device.emplace(key, device_storage(on_cpu.storage(), device.index())).first;
    return found->second;
  }

  // What an operator returns, on the device.
  at::Tensor result(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    auto argument = keys.find(tensor.storage().unsafeGetStorageImpl());
    if (argument == keys.end()) return tensor_over(storage_of(tensor), c10::DispatchKey::CUDA, tensor);
    // A view of an inference tensor is one too, whatever the mode.
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, storage_of(tensor), argument->second, tensor.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    return made;
  }

  // After an operator has written to a stand-in, which it may have resized.
  void written(const at::Tensor& tensor, const at::Tensor& stood_in) {
    if (!tensor.defined() || !tensor.is_cuda()) return;
    Storage storage = storage_of(stood_in);
    if (storage.data() != stood_in.storage().data()) {
      storage.set_data_ptr_noswap(
          device_pointer(StoragePointer::reclaim_copy(stood_in.storage().unsafeGetStorageImpl()), device.index()));
      storage.set_nbytes(stood_in.storage().nbytes());
    }
    auto* impl = tensor.unsafeGetTensorImpl();
    if (storage.unsafeGetStorageImpl() != tensor.storage().unsafeGetStorageImpl()) impl->set_storage_keep_dtype(storage);
    if (tensor.sizes() != stood_in.sizes() || tensor.strides() != stood_in.strides() ||
        tensor.storage_offset() != stood_in.storage_offset())
      impl->set_sizes_and_strides(stood_in.sizes(), stood_in.strides(), stood_in.storage_offset());
  }

  void check_devices(const std::string& name) {
    const char* start = "Expected all tensors to be on the same device, but found at least two devices, ";
    for (auto& tensor : of_device)
      TORCH_CHECK(tensor.device() == device, start, device, " and ", tensor.device(), "! (", name, ")");
    if (of_device.empty()) return;
    const bool scalars = accepting_scalars().count(name) > 0;
    for (auto& tensor : of_cpu)
      TORCH_CHECK(scalars && tensor.dim() == 0, start, device, " and ", tensor.device(), "! (", name, ")");
    if (name == "aten::index.Tensor_out") return;  // comes after a function that has copied them
    for (auto& tensor : cpu_indices) tell("h2d", name + " (index)", tensor.nbytes());
  }
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& parameters = schema.arguments();
  const std::string name = name_of(schema);
  const auto arguments = torch::jit::last(stack, parameters.size()).vec();
  torch::jit::drop(*stack, parameters.size());
  const bool takes_indices = kAcceptingIndices.count(name) > 0;
  Call call;
  torch::jit::Stack inner;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = arguments[i];
    if (value.isTensor()) {
      inner.emplace_back(call.stand_in(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& one : value.toTensorVector()) list.push_back(call.stand_in(one));
      inner.emplace_back(std::move(list));
    } else if (
        value.isList() && value.toListRef().size() && (value.toListRef()[0].isTensor() || value.toListRef()[0].isNone()) &&
        parameters[i].type()->str().find("Tensor") != std::string::npos) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& one : value.toListRef())
        list.push_back(
            one.isNone() ? std::optional<at::Tensor>()
                         : std::optional<at::Tensor>(call.stand_in(one.toTensor(), takes_indices)));
      inner.emplace_back(std::move(list));
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      if (call.device.index() < 0 && value.toDevice().index() >= 0) call.device = value.toDevice();
      inner.emplace_back(Device(c10::kCPU));
    } else {
      inner.push_back(value);
    }
  }
  if (call.device.index() < 0) call.device = Device(c10::kCUDA, current);
  call.check_devices(name);
  if (kWaiting.count(name)) tell("wait", name, 0);
  const torch::jit::Stack stood_in = inner;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &inner);
  }
  const auto is_written = [](const c10::Argument& one) { return one.alias_info() && one.alias_info()->isWrite(); };
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!is_written(parameters[i])) continue;
    if (arguments[i].isTensor()) {
      call.written(arguments[i].toTensor(), stood_in[i].toTensor());
    } else if (arguments[i].isTensorList()) {
      const auto originals = arguments[i].toTensorVector(), used = stood_in[i].toTensorVector();
      for (size_t k = 0; k < originals.size(); ++k) call.written(originals[k], used[k]);
    }
  }
  for (size_t r = 0; r < schema.returns().size(); ++r) {
    const auto& value = inner[r];
    const auto& returned = schema.returns()[r];
    if (value.isTensor() && is_written(returned)) {  // an argument, returned
      size_t i = 0;
      while (i < arguments.size() && !(arguments[i].isTensor() && is_written(parameters[i]) &&
                                       *parameters[i].alias_info() == *returned.alias_info()))
        ++i;
      TORCH_CHECK(i < arguments.size(), name, " returns none of its arguments");
      stack->push_back(arguments[i]);
    } else if (value.isTensor()) {
      stack->emplace_back(call.result(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& one : value.toTensorVector()) list.push_back(call.result(one));
      stack->emplace_back(std::move(list));
    } else {
      stack->push_back(value);
    }
  }
}

// ---- Operators with a kernel of their own

const c10::DispatchKeySet kDeviceKeys(c10::DispatchKey::CUDA);

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  WithDevice with(device);
  return at::detail::empty_generic(size, &device_allocator(), kDeviceKeys, c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  WithDevice with(device);
  return at::detail::empty_strided_generic(size, stride, &device_allocator(), kDeviceKeys, c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  const char* kind = !self.is_cuda() ? "d2h" : !source.is_cuda() ? "h2d" : self.device() != source.device() ? "p2p" : nullptr;
  if (kind) tell(kind, non_blocking ? "copy_ (non-blocking)" : "copy_", source.numel() * source.element_size());
  Call call;
  auto from = call.stand_in(source), to = call.stand_in(self);
  at::AutoDispatchBelowADInplaceOrView below;
  to.copy_(from);
  return self;
}

// On a GPU it takes integers too; the experts of a mixture are counted so.
at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& min, const at::Scalar& max) {
  Call call;
  auto values = call.stand_in(self);
  at::AutoDispatchBelowADInplaceOrView below;
  return call.result(at::histc(values.to(at::kDouble), bins, min, max).to(self.scalar_type()));
}

// On a GPU these read half precision and write float32.
template <at::Tensor (*softmax)(const at::Tensor&, int64_t, bool)>
at::Tensor softmax_of_half(const at::Tensor& self, int64_t dim, bool half_to_float) {
  Call call;
  auto values = call.stand_in(self);
  at::AutoDispatchBelowADInplaceOrView below;
  return call.result(softmax(half_to_float ? values.to(at::kFloat) : values, dim, false));
}
template <at::Tensor (*backward)(const at::Tensor&, const at::Tensor&, int64_t, at::ScalarType)>
at::Tensor softmax_of_half_backward(
    const at::Tensor& gradient, const at::Tensor& output, int64_t dim, at::ScalarType dtype) {
  Call call;
  auto gradient_on_cpu = call.stand_in(gradient), output_on_cpu = call.stand_in(output);
  call.check_devices("aten::_softmax_backward_data");
  at::AutoDispatchBelowADInplaceOrView below;
  return call.result(backward(gradient_on_cpu, output_on_cpu, dim, gradient.scalar_type()).to(dtype));
}

void record_stream(at::Tensor&, c10::Stream) {}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  if (stride.empty() && size.size() > 0) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}
at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const int64_t count = source.nbytes() / self.element_size();
  return set_storage(self, source, 0, {count}, {});
}

// ---- What PyTorch asks about devices

struct DeviceGuard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device device) const override {
    Device before(c10::kCUDA, current);
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(c10::kCUDA, current); }
  void setDevice(Device device) const override {
    if (device.index() < 0) return;
    TORCH_CHECK(device.index() < device_count(), "CUDA error: invalid device ordinal (simulated)");
    current = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  static c10::Stream stream(Device device) {
    return c10::Stream(c10::Stream::DEFAULT, Device(c10::kCUDA, device.index() < 0 ? current : device.index()));
  }
  c10::Stream getStream(Device device) const override { return stream(device); }
  c10::Stream getDefaultStream(Device device) const override { return stream(device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return stream(device); }
  c10::Stream getNewStream(Device device, int) const override { return stream(device); }
  c10::Stream exchangeStream(c10::Stream given) const override { return given; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { tell("wait", "stream", 0); }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override { tell("wait", "device", 0); }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0; }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
};
C10_REGISTER_GUARD_IMPL(CUDA, DeviceGuard);

}  // namespace

namespace at {
// PyTorch looks for a class of this name.
struct CUDAHooks : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return false; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  int getNumGPUs() const override { return device_count(); }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { current = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    DeviceIndex before = current;
    if (device >= 0) current = device;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override {
    static auto* allocator = new PinnedAllocator();
    return allocator;
  }
  Allocator* getCUDADeviceAllocator() const override { return &device_allocator(); }
  Device getDeviceFromPtr(void*) const override { return Device(kCUDA, current); }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void deviceSynchronize(DeviceIndex) const override { tell("wait", "device", 0); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

namespace c10d {
struct DeviceTimer : public Timer {  // DistributedDataParallel asks for one
  explicit DeviceTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, DeviceTimer);
}  // namespace c10d

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("histc", TORCH_FN(histc));
  m.impl("_softmax", TORCH_FN((softmax_of_half<&at::_softmax>)));
  m.impl("_log_softmax", TORCH_FN((softmax_of_half<&at::_log_softmax>)));
  m.impl("_softmax_backward_data", TORCH_FN((softmax_of_half_backward<&at::_softmax_backward_data>)));
  m.impl("_log_softmax_backward_data", TORCH_FN((softmax_of_half_backward<&at::_log_softmax_backward_data>)));
  // Otherwise composed of operators that exist on GPUs only.
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(c10::kCUDA, &device_allocator());
  // If PyTorch has already asked for hooks, it holds those of a build without CUDA: an object without members, which is
  // replaced in place.
  auto& hooks = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  static_assert(sizeof(at::CUDAHooks) == sizeof(at::CUDAHooksInterface));
  if (!hooks.hasCUDA()) new (&hooks) at::CUDAHooks(at::CUDAHooksArgs{});

  m.def("device_count", &device_count);
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("set_device", [](int device) { DeviceGuard().setDevice(Device(c10::kCUDA, device)); });
  m.def("used", [](int device) { return memory(device).used.load(); });
  m.def("peak", [](int device) { return memory(device).peak.load(); });
  m.def("total", [](int device) { return memory(device).total.load(); });
  m.def("set_total", [](int device, int64_t bytes) { memory(device).total = bytes; });
  m.def("reset_peak", [](int device) { memory(device).peak = memory(device).used.load(); });
  m.def("accept_scalars", [](std::vector<std::string> names) { accepting_scalars() = {names.begin(), names.end()}; });
  m.def("set_listener", [](pybind11::object call) { listener = call.release().ptr(); });
  m.def("resize_storage", [](at::Tensor bytes, int64_t size) {
    Storage storage = bytes.storage();
    WithDevice with(bytes.device());
    c10::DataPtr made = device_allocator().allocate(size);
    if (size && storage.nbytes()) std::memcpy(made.get(), storage.data(), std::min<int64_t>(size, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(made));
    storage.set_nbytes(size);
  });
  // A tensor of the CPU with the memory of one of the device: for collectives.
  m.def("host_view", [](at::Tensor tensor) { return tensor.is_cuda() ? Call().stand_in(tensor) : tensor; });
}
