//! What the sender asks for and what it is told.

use std::time::Instant;

use understudy_protocol::control::{Attached, Captured, HandedOver};
use understudy_protocol::ids::{Epoch, Generation};

use crate::message::Message;

/// What the hook is asked to do for the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VetoCall {
    /// Make durable that no other node is promoted.
    Veto,
    /// Lift that.
    ClearVeto,
}

/// How far [`Action::SendDisks`] came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DisksSent {
    /// There is more.
    More,
    /// There is more when the peer has said what is durable.
    Wait,
    /// Everything.
    All,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Nothing until an event comes or the time is reached.
    Wait(Instant),
    /// Connect to the VMM and attach. → `Attached`, `VmmLost` or `VmmRefused`.
    Attach,
    /// Close the VMM's session (it resumes the guest by itself). No event.
    Detach,
    /// Tell the VMM to quit: the machine runs elsewhere. → `VmmDone` or `VmmLost`.
    Quit,
    /// → `VmmDone`, `VmmLost`, `VmmRefused`.
    DirtyLogStart,
    /// Fetch the dirty log; `send`: its pages are to be sent by later `SendDirty`. → `Harvested`.
    Harvest {
        /// Keep the bitmap.
        send: bool,
    },
    /// Send the next pages of the bitmap. → `DirtySent` or `PeerLost`.
    SendDirty,
    /// Have the VMM begin with the peer's copies of the mirrored disks as they are, and tell the peer. → `CopiesRead`, or `PeerLost` if one of them must not
    /// be touched.
    BeginCopies,
    /// Send the next parts of mirrored disks. → `CopiesRead` or `PeerLost`.
    CopyDisks,
    /// Send a part of what the copies need of the epoch whose disks are sealed, then the next. → `DisksSent`, then `PeerLost` if sending failed.
    SendDisks,
    /// Send the next slice of RAM, from the start if `first`. → `Copied` or `PeerLost`.
    CopySlice {
        /// Begin at page zero.
        first: bool,
    },
    /// → `Captured`.
    Cut {
        /// Epoch that ends.
        epoch: Epoch,
        /// Gate to `Hold`.
        arm: bool,
        /// Stay stopped.
        last: bool,
        /// Early pages went to a peer that is gone: forget that they were sent.
        again: bool,
    },
    /// Copy pages for the epoch that ends at the next cut. → `Precopied`.
    Precopy(Epoch),
    /// → `Captured`.
    CutContinue,
    /// Encode and send the arena's content; after the last piece also the end of the epoch. → `PieceSent` in any
    /// case, then `PeerLost` if sending failed.
    SendPiece(Captured),
    /// Have the VMM make durable what the disks have of this epoch; only of a machine with disks, and before the `SendPiece` that ends the epoch.
    /// → `VmmDone`, `VmmLost`, `VmmRefused`.
    SealDisks(Epoch),
    /// Send the kept epochs after this one again. → `Resent` or `PeerLost`.
    Resend {
        /// The peer holds it.
        after: Epoch,
    },
    /// Let the guest run for this share of the time, percent. → `VmmDone`.
    Throttle(u8),
    /// → `VmmDone`.
    Committed(Epoch),
    /// → `VmmDone`.
    GateOpen,
    /// Connect to the next peer, in the background. → `Connected` or `PeerLost` later.
    Connect,
    /// Send. → nothing, or `PeerLost`.
    Send(Epoch, Message<'static>),
    /// Close the connection with the peer. No event.
    Disconnect,
    /// Ask the hook, in the background. → `Hook` later.
    Hook(VetoCall),
    /// Answer the pending hand-over.
    AnswerHandOver(Result<HandedOver, String>),
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // Each is named at the action that it answers.
pub enum Event {
    Attached {
        attached: Attached,
        /// The last epoch that was cut in the machine's life here, as the VMM knows it.
        last_cut: Epoch,
        /// Random, new for every attachment.
        session: u64,
    },
    VmmLost(String),
    VmmRefused(String),
    VmmDone,
    Harvested {
        pages: u64,
    },
    DirtySent {
        done: bool,
    },
    Copied {
        done: bool,
    },
    /// So many bytes were sent, and the copies lack so many more. `wait`: until the peer has said what is durable.
    CopiesRead {
        sent: u64,
        left: u64,
        wait: bool,
    },
    DisksSent(DisksSent),
    Captured(Captured),
    /// As `Captured`, for pages copied before the cut; `more` is always set.
    Precopied(Captured),
    /// Outputs began to wait for a cut.
    OutputWaits,
    /// `kept`: the whole epoch so far is kept for a resend.
    PieceSent {
        kept: bool,
    },
    Resent,
    Connected,
    PeerLost(String),
    /// The peer said something.
    Message(Generation, Epoch, Message<'static>),
    /// A sender of this generation has knocked at this node's door.
    NewerGeneration(Generation),
    Hook(VetoCall, Result<(), String>),
    /// Hand over the machine.
    HandOver,
}
