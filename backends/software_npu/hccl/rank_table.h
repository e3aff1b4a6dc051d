// A rank table, as far as a communicator needs it.
#pragma once

#include <string>

namespace software_npu {

struct RankTable {
    std::string id;  // the same for all processes of a job that read the same table
    int size = 0;
    std::string wrong;  // empty where rank and device are what the table says
};

RankTable read_rank_table(const std::string &path, int rank, int device);

}  // namespace software_npu
