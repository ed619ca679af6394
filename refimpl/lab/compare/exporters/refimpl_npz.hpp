// Writes values of an engine as .npz, for `refimpl compare`: one header, C++17, no other library.
//
//   refimpl::Npz out("dump.npz");
//   out.add("ids", {n_tokens}, ids);                              // std::int64_t, std::int32_t
//   out.add("arithmetic", "float32");                             // or bfloat16, float16, q8
//   out.add("l_out-0", {n_tokens, width}, values);                // float; names: refimpl trace --names
//   out.close();                                                  // the file gets its name here
//
// A zip without compression (PKWARE APPNOTE) of arrays in NumPy's format 1.0; at most 4 GB and 65,535 arrays. Throws std::runtime_error.
#pragma once
#include <array>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

namespace refimpl {

class Npz {
public:
    explicit Npz(std::string path) : path_(std::move(path)), file_(std::fopen((path_ + ".part").c_str(), "wb")) {
        if (!file_) throw std::runtime_error(path_ + ": cannot be written");
    }
    Npz(const Npz &) = delete;
    Npz &operator=(const Npz &) = delete;
    ~Npz() {
        if (file_) { std::fclose(file_); std::remove((path_ + ".part").c_str()); }
    }
    void add(const std::string &name, std::vector<std::size_t> shape, const float *x) { array(name, "<f4", shape, x, 4); }
    void add(const std::string &name, std::vector<std::size_t> shape, const std::int32_t *x) { array(name, "<i4", shape, x, 4); }
    void add(const std::string &name, std::vector<std::size_t> shape, const std::int64_t *x) { array(name, "<i8", shape, x, 8); }
    void add(const std::string &name, const std::string &words) {
        array(name, "|S" + std::to_string(words.size() ? words.size() : 1), {}, words.c_str(), words.size() ? words.size() : 1);
    }
    void add(const std::string &name, double number) { array(name, "<f8", {}, &number, 8); }

    void close() {
        const std::uint64_t start = at_;
        write(central_.data(), central_.size());
        std::string end("PK\5\6\0\0\0\0", 8);
        put(end, count_, 2), put(end, count_, 2), put(end, central_.size(), 4), put(end, start, 4), put(end, 0, 2);
        write(end.data(), end.size());
        std::FILE *file = file_;
        file_ = nullptr;
        if (std::fclose(file) || (std::remove(path_.c_str()), std::rename((path_ + ".part").c_str(), path_.c_str())))
            throw std::runtime_error(path_ + ": cannot be written");
    }

private:
    void array(const std::string &name, const std::string &type, const std::vector<std::size_t> &shape, const void *data, std::size_t item) {
        std::string dims;
        std::uint64_t bytes = item;
        for (std::size_t n : shape) dims += std::to_string(n) + ",", bytes *= n;
        std::string head = "{'descr': '" + type + "', 'fortran_order': False, 'shape': (" + dims + "), }";
        head += std::string(63 - (10 + head.size()) % 64, ' ') + "\n";          // the data begin at a multiple of 64
        std::string npy("\x93NUMPY\1\0", 8);
        put(npy, head.size(), 2);
        npy += head;
        const std::uint64_t size = npy.size() + bytes;
        if (at_ + size + central_.size() > 0xFFFF0000u || count_ == 0xFFFF) throw std::runtime_error(path_ + ": more than a .npz of 4 GB holds");
        const std::uint32_t crc = ~crc32(crc32(~0u, npy.data(), npy.size()), data, bytes);
        std::string entry;                          // version, flags, method, time, date, checksum, sizes, length of the name, of the extra field
        put(entry, 20, 2), put(entry, 0x800, 2), put(entry, 0, 2), put(entry, 0, 2), put(entry, 0x21, 2);
        put(entry, crc, 4), put(entry, size, 4), put(entry, size, 4), put(entry, name.size() + 4, 2), put(entry, 0, 2);
        central_ += std::string("PK\1\2\x14\0", 6) + entry + std::string(10, '\0');
        put(central_, at_, 4);
        central_ += name + ".npy";
        const std::string local = "PK\3\4" + entry + name + ".npy";
        write(local.data(), local.size()), write(npy.data(), npy.size()), write(data, bytes);
        ++count_;
    }
    static void put(std::string &out, std::uint64_t value, int bytes) {
        for (; bytes--; value >>= 8) out += static_cast<char>(value & 0xFF);
    }
    static std::uint32_t crc32(std::uint32_t crc, const void *data, std::uint64_t n) {
        static const std::array<std::uint32_t, 256> table = [] {
            std::array<std::uint32_t, 256> made{};
            for (std::uint32_t i = 0; i < 256; ++i) {
                std::uint32_t c = i;
                for (int k = 0; k < 8; ++k) c = c & 1 ? 0xEDB88320u ^ c >> 1 : c >> 1;
                made[i] = c;
            }
            return made;
        }();
        for (auto p = static_cast<const unsigned char *>(data); n--; ++p) crc = table[(crc ^ *p) & 0xFF] ^ crc >> 8;
        return crc;
    }
    void write(const void *data, std::uint64_t n) {
        if (std::fwrite(data, 1, n, file_) != n) throw std::runtime_error(path_ + ": cannot be written, the disk may be full");
        at_ += n;
    }

    std::string path_, central_;
    std::FILE *file_;
    std::uint64_t at_ = 0;
    unsigned count_ = 0;
};

}  // namespace refimpl
