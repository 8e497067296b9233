#include "sha256.h"

#include <openssl/evp.h>

#include <fstream>
#include <memory>
#include <vector>

#include "messages.h"

namespace dcompile {

std::string sha256_of(const std::filesystem::path& file) {
    const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> digest(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    bool fine = digest && EVP_DigestInit_ex(digest.get(), EVP_sha256(), nullptr) == 1;
    std::ifstream stream(file, std::ios::binary);
    std::vector<char> block(1 << 20);
    while (fine && stream) {
        stream.read(block.data(), std::streamsize(block.size()));
        fine = EVP_DigestUpdate(digest.get(), block.data(), std::size_t(stream.gcount())) == 1;
    }
    unsigned char sum[EVP_MAX_MD_SIZE];
    unsigned size = 0;
    if (!fine || !stream.eof() || EVP_DigestFinal_ex(digest.get(), sum, &size) != 1)
        fail(ErrorKind::bundle, file.string(), ": cannot be read; copy the bundle again");
    std::string out;
    for (unsigned i = 0; i < size; ++i) out += {"0123456789abcdef"[sum[i] >> 4], "0123456789abcdef"[sum[i] & 15]};
    return out;
}

}  // namespace dcompile
