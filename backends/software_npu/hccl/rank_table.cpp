// Reads a rank table: see rank_table.h. Octofold itself checks tables (backends/rank_table.py); here is what HCCL cannot
// do without: how many ranks there are, and that a rank stands on the device that the table gives it.
#include "rank_table.h"

#include <cstdlib>
#include <fstream>
#include <functional>
#include <regex>
#include <sstream>

namespace software_npu {

namespace {

// The value of a key in a JSON object without others inside; empty where it is not there.
std::string value_of(const std::string &object, const std::string &key) {
    std::smatch found;
    std::regex pair("\"" + key + "\"\\s*:\\s*\"?([^\",}\\s]*)");
    return std::regex_search(object, found, pair) ? found[1].str() : "";
}

}  // namespace

RankTable read_rank_table(const std::string &path, int rank, int device) {
    RankTable table;
    std::ifstream file(path);
    std::ostringstream all;
    all << file.rdbuf();
    const std::string text = all.str();
    bool here = false;
    std::regex entry("\\{[^{}]*\"rank_id\"[^{}]*\\}");
    for (std::sregex_iterator found(text.begin(), text.end(), entry), end; found != end; ++found) {
        table.size++;
        const std::string object = found->str();
        if (value_of(object, "rank_id") != std::to_string(rank)) continue;
        here = true;
        const std::string given = value_of(object, "device_id");
        if (given != std::to_string(device)) {
            table.wrong = path + " has rank " + std::to_string(rank) + " on device " + given + ", and it runs on device " +
                          std::to_string(device);
        }
    }
    if (!here) table.wrong = path + " has no rank " + std::to_string(rank);
    // Jobs of one machine that share a table meet at different ports.
    const char *port = std::getenv("MASTER_PORT");
    table.id = "table-" + std::to_string(std::hash<std::string>()(text)) + "-" + (port ? port : "0");
    return table;
}

}  // namespace software_npu
