//! Numbers that must not be mixed up.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The value before the first one that is handed out.
            pub const ZERO: Self = Self(0);

            /// The following value. Counters are 64 bit and start near zero: they do not wrap in practice.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter! {
    /// The stretch of execution between two cuts, counted from 1 within one generation's replication session history.
    /// Zero means "none yet".
    Epoch
}
counter! {
    /// Counts takeovers (and cold boots) of one machine; the higher one wins everywhere. Zero means "never ran".
    Generation
}
