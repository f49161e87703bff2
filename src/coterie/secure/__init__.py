"""Secure sums: a server adds up its sites' vectors and learns the sum, not the vectors. Knows no engine and no method.

The protocol of Bonawitz et al. (CCS 2017), in its variant against an active server, over the graph of Bell et al. (CCS
2020) where a group is large. Every site i has a vector x_i of 64-bit integers, and all arithmetic is modulo 2^64.

    y_i = x_i + PRG(b_i) + sum over neighbours j of +-PRG(s_ij),      sum_i y_i = sum_i x_i + sum_i PRG(b_i)

1. **keys**: a site makes two X25519 key pairs and the seed b_i, and signs the public keys with its registered key.
2. **shares**: it checks everybody's signature, cuts b_i and its secret mask key into Shamir shares, and seals one of
   each for every neighbour. The server passes the sealed shares on.
3. **values**: it sends y_i, masked with every neighbour that has sent shares. s_ij is X25519's secret through HKDF,
   with the session bound in; PRG is ChaCha20.
4. **survivors**: the server names the sites whose y arrived. Each signs that list, once.
5. **reveal**: with enough signatures under one list, a site reveals its shares: of b_j for a site j on the list, of the
   mask key for a site that vanished before it sent y_j. Never both of one site: that would unmask its vector.

Sites may vanish at any step. The sum is opened if, at each, at least ``needed`` sites are left (:mod:`.session`).

**What it protects**: a server that follows no rule, together with fewer sites than the threshold allows, learns no more
than sums over at least ``needed`` sites. **Not**: what the sum itself says; sites that send wrong values; a server that
holds the registered keys of enough sites.

:mod:`.shamir` cuts secrets, :mod:`.masks` makes masks, :mod:`.fixed_point` turns numbers into integers, :mod:`.session`
says what all agree on, :mod:`.messages` what is sent, :mod:`.member` is a site's side, :mod:`.collector` the server's,
and :mod:`.steps` brings both together over anything that carries bytes.
"""
