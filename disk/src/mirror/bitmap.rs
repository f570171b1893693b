//! Which blocks of this disk a peer may lack.
