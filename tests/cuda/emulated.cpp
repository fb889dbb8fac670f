// One instantiation of the decode kernels for the CPU. Compiled with OMNIGENE_EMULATOR, HIDDEN, WEIGHT and VEC.
#include "decode_up.cu"

#include "decode_down.cu"

namespace {

template <class T>
T as(i64 word) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(word);
    } else {
        static_assert(std::is_same_v<T, i64>, "kernels take pointers and 64-bit integers");
        return word;
    }
}

template <class... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), const i64* arguments, std::index_sequence<I...>) {
    kernel(as<Parameters>(arguments[I])...);
}

template <class... Parameters>
std::string launch(void (*kernel)(Parameters...), u32 grid_x, u32 grid_y, int threads, u32 seed, const i64* arguments,
                   int count) {
    if (count != int(sizeof...(Parameters))) return "the kernel takes " + std::to_string(sizeof...(Parameters)) + " arguments";
    return emulator::run(grid_x, grid_y, threads, seed,
                         [=] { call(kernel, arguments, std::index_sequence_for<Parameters...>{}); });
}

}  // namespace

// `ranges` holds begin, end and kind of each tensor. Returns null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* run(const char* name, u32 grid_x, u32 grid_y, int threads,
                                                                  u32 seed, const i64* arguments, int count,
                                                                  const i64* ranges, int tensors) {
    static std::string error;
    emulator::machine.ranges.clear();
    for (int i = 0; i < tensors; ++i)
        emulator::machine.ranges.push_back({as<const char*>(ranges[3 * i]), as<const char*>(ranges[3 * i + 1]),
                                            emulator::Kind(ranges[3 * i + 2])});
    const bool up = std::string(name) == "decode_up";
    error = up ? launch(decode_up, grid_x, grid_y, threads, seed, arguments, count)
               : launch(decode_down, grid_x, grid_y, threads, seed, arguments, count);
    return error.empty() ? nullptr : error.c_str();
}
