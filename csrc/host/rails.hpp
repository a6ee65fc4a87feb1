// Who is joined to whom between domains: the host's side, the same for every rank of a group.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "kernels/two_level/args.hpp"
#include "layout/rules/two_level.hpp"

namespace deepep::host {

/// Ranks in domains, and those of them that take part.
struct RailPlan {
  layout::Placement place;
  layout::RankMask live;

  [[nodiscard]] bool is_live(int rank) const { return live.has(rank); }
  /// -1: none of the domain takes part.
  [[nodiscard]] int gateway(int source, int domain) const {
    return layout::living_gateway(source, domain, place, [this](int rank) { return is_live(rank); });
  }
  /// The other ends of a rank's rails, ascending.
  [[nodiscard]] std::vector<int> peers_of(int rank) const {
    std::vector<int> peers;
    const int own = place.domain_of_rank(rank);
    for (int r = 0; r < place.num_ranks; ++r) {
      const int other = place.domain_of_rank(r);
      if (is_live(r) && other != own && (gateway(r, own) == rank || gateway(rank, other) == r))
        peers.push_back(r);
    }
    return peers;
  }
  /// Ranks whose gateway in this one's domain it is, itself the first; the others ascend.
  [[nodiscard]] std::vector<int> served_by(int gateway_rank) const {
    std::vector<int> sources{gateway_rank};
    for (int r = 0; r < place.num_ranks; ++r)
      if (is_live(r) && r != gateway_rank && gateway(r, place.domain_of_rank(gateway_rank)) == gateway_rank &&
          place.domain_of_rank(r) != place.domain_of_rank(gateway_rank))
        sources.push_back(r);
    return sources;
  }
  /// The most that any rank has: memory is laid out alike on all.
  [[nodiscard]] int max_rails() const {
    return most([this](int r) { return peers_of(r).size(); });
  }
  [[nodiscard]] int max_served() const {
    return most([this](int r) { return served_by(r).size(); });
  }

  [[nodiscard]] kernels::Rails rails_of(int rank) const {
    kernels::Rails rails{};
    const std::vector<int> peers = peers_of(rank);
    const auto number = [](const std::vector<int>& ranks, int r) {
      return static_cast<int16_t>(std::find(ranks.begin(), ranks.end(), r) - ranks.begin());
    };
    const int own = place.domain_of_rank(rank);
    rails.num_rails = static_cast<int>(peers.size());
    for (int i = 0; i < rails.num_rails; ++i) {
      const int peer = peers[static_cast<size_t>(i)];
      rails.peer[i] = static_cast<int16_t>(peer);
      rails.there[i] = number(peers_of(peer), rank);
      if (gateway(peer, own) == rank) rails.in[rails.num_in++] = static_cast<int16_t>(i);
    }
    for (int domain = 0; domain < place.num_domains(); ++domain) {
      const int there = domain == own ? -1 : gateway(rank, domain);
      if (there < 0) continue;
      rails.out[rails.num_out] = number(peers, there);
      rails.out_first[rails.num_out] = static_cast<int16_t>(place.first_rank_of_domain(domain));
      rails.out_size[rails.num_out++] = static_cast<int16_t>(place.num_ranks_of_domain(domain));
    }
    for (int source = 0; source < place.num_ranks; ++source) {
      const bool is_near = place.domain_of_rank(source) == own;
      const int there = !is_live(source) ? -1 : is_near ? source : gateway(source, own);
      rails.gateway[source] = static_cast<int16_t>(there < 0 ? -1 : there - place.first_rank_of_domain(own));
      if (there >= 0) rails.slot[source] = number(served_by(there), source);
    }
    return rails;
  }

 private:
  template <class Count>
  [[nodiscard]] int most(const Count& count) const {
    size_t found = 0;
    for (int r = 0; r < place.num_ranks; ++r)
      if (is_live(r)) found = std::max<size_t>(found, count(r));
    return static_cast<int>(found);
  }
};

}  // namespace deepep::host
