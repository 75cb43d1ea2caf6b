// What the CPU's custom calls share: reading XLA's call frames, and running tasks on XLA's own threads.

#ifndef KPX_KERNELS_FFI_H_
#define KPX_KERNELS_FFI_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#include "xla/ffi/api/c_api.h"

namespace kpx {

struct Span {
  const int64_t* data;
  int64_t size;
};

// An attribute that is an array of int64; empty where it is absent.
inline Span Attribute(const XLA_FFI_Attrs& attrs, const char* name) {
  for (int64_t i = 0; i < attrs.size; ++i) {
    const XLA_FFI_ByteSpan* span = attrs.names[i];
    if (attrs.types[i] == XLA_FFI_AttrType_ARRAY && span->len == std::strlen(name) &&
        std::memcmp(span->ptr, name, span->len) == 0) {
      auto* array = static_cast<XLA_FFI_Array*>(attrs.attrs[i]);
      return {static_cast<const int64_t*>(array->data), static_cast<int64_t>(array->size)};
    }
  }
  return {nullptr, 0};
}

inline XLA_FFI_Buffer* Argument(const XLA_FFI_CallFrame* frame, int64_t i) {
  return static_cast<XLA_FFI_Buffer*>(frame->args.args[i]);
}

inline XLA_FFI_Buffer* Result(const XLA_FFI_CallFrame* frame, int64_t i) {
  return static_cast<XLA_FFI_Buffer*>(frame->rets.rets[i]);
}

inline XLA_FFI_Error* Fail(const XLA_FFI_Api* api, const char* message) {
  XLA_FFI_Error_Create_Args args{};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message;
  args.errc = XLA_FFI_Error_Code_INVALID_ARGUMENT;
  return api->XLA_FFI_Error_Create(&args);
}

// Whether a call of XLA's went well; its error is not kept.
inline bool Succeeded(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  if (error == nullptr) return true;
  XLA_FFI_Error_Destroy_Args args{};
  args.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
  args.error = error;
  api->XLA_FFI_Error_Destroy(&args);
  return false;
}

// Whether XLA asks which version of its interface a handler has, which this then answers.
inline bool AsksForVersion(XLA_FFI_CallFrame* frame) {
  for (auto* extension = frame->extension_start; extension != nullptr; extension = extension->next) {
    if (extension->type == XLA_FFI_Extension_Metadata) {
      auto* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(extension)->metadata;
      metadata->api_version.major_version = XLA_FFI_API_MAJOR;
      metadata->api_version.minor_version = XLA_FFI_API_MINOR;
      return true;
    }
  }
  return false;
}

inline int64_t Threads(const XLA_FFI_CallFrame* frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args{};
  args.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE;
  args.ctx = frame->ctx;
  args.num_threads = &threads;
  return Succeeded(frame->api, frame->api->XLA_FFI_ThreadPool_NumThreads(&args)) ? std::max<int64_t>(threads, 1) : 1;
}

// Tasks that threads take until none is left. Threads that come too late find nothing to do, so nobody waits for a
// task that has not started, and the pool cannot deadlock.
class Tasks {
 public:
  // Runs `work(i)` for each i below `count`, on `threads` threads of XLA's at most, this one among them. What a task
  // throws is thrown here, when all are done.
  static void Run(const XLA_FFI_CallFrame* frame, int64_t count, int64_t threads,
                  const std::function<void(int64_t)>& work) {
    threads = std::min(count, threads);
    if (threads <= 1) {
      for (int64_t i = 0; i < count; ++i) work(i);
      return;
    }
    auto* tasks = new Tasks(count, work);
    for (int64_t i = 1; i < threads; ++i) {
      XLA_FFI_ThreadPool_Schedule_Args args{};
      args.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE;
      args.ctx = frame->ctx;
      args.task = RunScheduled;
      args.data = tasks;
      tasks->references_.fetch_add(1);
      if (!Succeeded(frame->api, frame->api->XLA_FFI_ThreadPool_Schedule(&args))) tasks->Release();
    }
    tasks->Take();
    for (int spins = 0; tasks->done_.load(std::memory_order_acquire) < count; ++spins) {
      if (spins > 4096) std::this_thread::yield();
    }
    const std::exception_ptr error = tasks->error_;
    tasks->Release();
    if (error) std::rethrow_exception(error);
  }

 private:
  Tasks(int64_t count, const std::function<void(int64_t)>& work) : count_(count), work_(work) {}

  void Take() {
    for (int64_t task; (task = next_.fetch_add(1)) < count_;) {
      try {
        work_(task);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  static void RunScheduled(void* data) {
    auto* tasks = static_cast<Tasks*>(data);
    tasks->Take();
    tasks->Release();
  }

  void Release() {
    if (references_.fetch_sub(1) == 1) delete this;
  }

  const int64_t count_;
  const std::function<void(int64_t)>& work_;  // the caller's, which waits until every task is done
  std::atomic<int64_t> next_{0}, done_{0}, references_{1};
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace kpx

#endif  // KPX_KERNELS_FFI_H_
