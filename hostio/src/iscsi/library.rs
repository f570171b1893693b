//! libiscsi, opened when it is first needed: its functions, and one connection as a safe type.
//!
//! Only what has been there unchanged since libiscsi 1.18 (`libiscsi.so.7`) is used. Of its structures only the head of `struct scsi_task` is looked
//! at, which has not changed either (`scsi-lowlevel.h`): how much was not transferred, and the sense data.
//!
//! What must hold: a task and its buffer belong to the [`Connection`] until the library has called back *and* returned. It calls back only from within
//! `iscsi_service` and `iscsi_destroy_context`, on the connection's thread.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_void};
use std::marker::PhantomData;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::OnceLock;

use libloading::Library;

use crate::Buffer;

use super::{Data, Target};

/// Names under which distributions have it.
const NAMES: [&str; 5] = ["libiscsi.so.7", "libiscsi.so.8", "libiscsi.so.9", "libiscsi.so.10", "libiscsi.so.11"];
/// A path to take instead.
pub const ENV_LIBRARY: &str = "UNDERSTUDY_LIBISCSI";

#[repr(C)]
struct Context {
    _opaque: [u8; 0],
}

/// The head of `struct scsi_task`, with that of the `struct scsi_sense` in it.
#[repr(C)]
struct Task {
    status: c_int,
    cdb_size: c_int,
    xfer_dir: c_int,
    expxferlen: c_int,
    cdb: [c_uchar; 16],
    residual_status: c_int,
    residual: usize,
    sense_error_type: c_uchar,
    sense_key: c_int,
    sense_ascq: c_int,
}

type Callback = unsafe extern "C" fn(*mut Context, c_int, *mut c_void, *mut c_void);

macro_rules! functions {
    ($($name:ident: fn($($arg:ty),*) $(-> $ret:ty)?;)*) => {
        struct Functions {
            $($name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
            // The functions are its.
            _library: Library,
        }
        impl Functions {
            fn of(library: libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: the signatures are those of iscsi.h and scsi-lowlevel.h; the pointers are kept together with the library.
                unsafe {
                    Ok(Self { $($name: *library.get(concat!(stringify!($name), "\0").as_bytes())?,)* _library: library })
                }
            }
        }
    };
}

functions! {
    iscsi_create_context: fn(*const c_char) -> *mut Context;
    iscsi_destroy_context: fn(*mut Context) -> c_int;
    iscsi_set_targetname: fn(*mut Context, *const c_char) -> c_int;
    iscsi_set_session_type: fn(*mut Context, c_int) -> c_int;
    iscsi_set_header_digest: fn(*mut Context, c_int) -> c_int;
    iscsi_set_initiator_username_pwd: fn(*mut Context, *const c_char, *const c_char) -> c_int;
    iscsi_set_isid_random: fn(*mut Context, u32, u32) -> c_int;
    iscsi_set_noautoreconnect: fn(*mut Context, c_int);
    iscsi_full_connect_async: fn(*mut Context, *const c_char, c_int, Callback, *mut c_void) -> c_int;
    iscsi_get_fd: fn(*mut Context) -> c_int;
    iscsi_which_events: fn(*mut Context) -> c_int;
    iscsi_service: fn(*mut Context, c_int) -> c_int;
    iscsi_get_error: fn(*mut Context) -> *const c_char;
    iscsi_nop_out_async: fn(*mut Context, Callback, *mut c_uchar, c_int, *mut c_void) -> c_int;
    iscsi_scsi_command_async: fn(*mut Context, c_int, *mut Task, Callback, *mut c_void, *mut c_void) -> c_int;
    iscsi_task_mgmt_lun_reset_async: fn(*mut Context, u32, Callback, *mut c_void) -> c_int;
    scsi_create_task: fn(c_int, *mut c_uchar, c_int, c_int) -> *mut Task;
    scsi_free_scsi_task: fn(*mut Task);
    scsi_task_add_data_in_buffer: fn(*mut Task, c_int, *mut c_uchar) -> c_int;
    scsi_task_add_data_out_buffer: fn(*mut Task, c_int, *mut c_uchar) -> c_int;
}

fn functions() -> Result<&'static Functions, String> {
    static LIBRARY: OnceLock<Result<Functions, String>> = OnceLock::new();
    LIBRARY.get_or_init(load).as_ref().map_err(Clone::clone)
}

static PATH: OnceLock<String> = OnceLock::new();

/// Take the library from this path; counts only before the first use.
pub fn load_from(path: &str) {
    let _ = PATH.set(path.to_owned());
}

/// A library needs at most so many that the system has not, one below the other.
const NEEDS: u32 = 8;

/// A library; of one that was unpacked somewhere and not installed, what it needs and the system has not is taken from beside it.
fn open(path: &Path, needs: u32) -> Result<Library, libloading::Error> {
    // SAFETY: its initialisers are a C library's usual ones.
    let load = || unsafe { Library::new(path) };
    let mut result = load();
    for _ in 0..needs {
        let Err(error) = &result else { break };
        // "libibverbs.so.1: cannot open shared object file: …" (dlerror(3))
        let said = error.to_string();
        let missing = said.split_once(": cannot open").and_then(|(name, _)| Path::new(name).file_name());
        let beside = missing.and_then(|name| Some(path.parent()?.join(name)));
        let Some(beside) = beside.filter(|beside| path.is_absolute() && beside != path && beside.exists()) else {
            break;
        };
        // It stays: whoever needs it finds it by its name.
        std::mem::forget(open(&beside, needs - 1)?);
        result = load();
    }
    result
}

fn load() -> Result<Functions, String> {
    let own = PATH.get().cloned().or_else(|| std::env::var(ENV_LIBRARY).ok());
    let names = own.iter().map(String::as_str).chain(NAMES.into_iter().filter(|_| own.is_none()));
    let mut why = String::new();
    for name in names {
        match open(Path::new(name), NEEDS).and_then(Functions::of) {
            Ok(functions) => return Ok(functions),
            Err(e) if why.is_empty() => why = e.to_string(),
            Err(_) => {}
        }
    }
    Err(format!(
        "libiscsi cannot be loaded ({why}): install it (Debian: apt-get install libiscsi7, Fedora and RHEL: dnf install libiscsi), \
         or attach the disk with the host's own initiator"
    ))
}

/// Whether iSCSI disks are possible on this host.
///
/// # Errors
/// A sentence that names the package.
pub fn present() -> Result<(), String> {
    functions().map(|_| ())
}

/// What the library said of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Said {
    pub status: i32,
    pub key: i32,
    pub ascq: i32,
    /// Bytes that were not transferred.
    pub residual: usize,
}

thread_local! {
    /// What was called back on this thread and not looked at yet.
    static CALLED: RefCell<Vec<(usize, Said)>> = const { RefCell::new(Vec::new()) };
}

unsafe extern "C" fn called_back(_: *mut Context, status: c_int, _: *mut c_void, id: *mut c_void) {
    let said = Said { status, key: 0, ascq: 0, residual: 0 };
    let _ = CALLED.try_with(|called| called.borrow_mut().push((id.addr(), said)));
}

/// The outcome of a task management function: a number of its own, zero is "function complete" (RFC 7143 §11.6.1).
unsafe extern "C" fn managed(_: *mut Context, status: c_int, response: *mut c_void, id: *mut c_void) {
    let status = if status == 0 && !response.is_null() {
        // SAFETY: libiscsi passes a pointer to 32 bits, which is good for the time of the call.
        unsafe { response.cast::<u32>().read_unaligned() as c_int }
    } else {
        status
    };
    let said = Said { status, key: 0, ascq: 0, residual: 0 };
    let _ = CALLED.try_with(|called| called.borrow_mut().push((id.addr(), said)));
}

/// Ids that are no request's.
pub(super) const CONNECTED: usize = usize::MAX;
pub(super) const ALIVE: usize = usize::MAX - 1;

/// One connection, from its first packet to its end.
pub(super) struct Connection {
    library: &'static Functions,
    context: *mut Context,
    lun: c_int,
    flying: BTreeMap<usize, (*mut Task, Data)>,
    // The library is used by one thread; so are its callbacks.
    _one_thread: PhantomData<*mut ()>,
}

fn c_string(text: &str) -> Result<CString, String> {
    CString::new(text).map_err(|_| format!("{text:?} has a zero byte in it"))
}

impl Connection {
    /// Begin to connect; [`CONNECTED`] ends it.
    pub fn begin(target: &Target) -> Result<Self, String> {
        let library = functions()?;
        let (initiator, name) = (c_string(&target.initiator)?, c_string(&target.name)?);
        let portal = c_string(&target.portal)?;
        CALLED.with_borrow_mut(Vec::clear);
        // SAFETY: it copies its argument.
        let context = unsafe { (library.iscsi_create_context)(initiator.as_ptr()) };
        if context.is_null() {
            return Err("libiscsi has no memory".into());
        }
        let lun = c_int::from(target.lun);
        let this = Self { library, context, lun, flying: BTreeMap::new(), _one_thread: PhantomData };
        let chap = target.chap.as_ref().map(|(user, secret)| Ok::<_, String>((c_string(user)?, c_string(secret)?)));
        let chap = chap.transpose()?;
        // SAFETY: the context is this connection's, and alive; all strings are copied. 2: a normal session; 1: digests if the target insists. The
        // numbers that are passed for a pointer are only handed back.
        let refused = unsafe {
            (library.iscsi_set_noautoreconnect)(context, 1);
            let mut refused = (library.iscsi_set_targetname)(context, name.as_ptr())
                | (library.iscsi_set_session_type)(context, 2)
                | (library.iscsi_set_header_digest)(context, 1)
                | (library.iscsi_set_isid_random)(context, target.session, 0);
            if let Some((user, secret)) = &chap {
                refused |= (library.iscsi_set_initiator_username_pwd)(context, user.as_ptr(), secret.as_ptr());
            }
            if refused == 0 {
                let id = std::ptr::without_provenance_mut(CONNECTED);
                refused = (library.iscsi_full_connect_async)(context, portal.as_ptr(), lun, called_back, id);
            }
            refused
        };
        if refused == 0 { Ok(this) } else { Err(this.error()) }
    }

    /// What the library says went wrong last.
    pub fn error(&self) -> String {
        // SAFETY: the context is alive, and what it returns lives as long and ends with a zero.
        let text = unsafe {
            let text = (self.library.iscsi_get_error)(self.context);
            if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
        };
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// The socket, if there is one.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the context is alive.
        let fd: RawFd = unsafe { (self.library.iscsi_get_fd)(self.context) };
        // SAFETY: the socket is the context's, which is borrowed.
        (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// What to poll the socket for.
    pub fn events(&self) -> i16 {
        // SAFETY: the context is alive.
        unsafe { (self.library.iscsi_which_events)(self.context) as i16 }
    }

    /// Let it work.
    pub fn service(&mut self, events: i16) -> Result<(), String> {
        // SAFETY: the context is alive; buffers of all tasks are in `flying`.
        let refused = unsafe { (self.library.iscsi_service)(self.context, c_int::from(events)) };
        if refused == 0 { Ok(()) } else { Err(self.error()) }
    }

    /// Ask the target for a sign of life; [`ALIVE`] is the answer.
    pub fn ask(&mut self) -> Result<(), String> {
        let id = std::ptr::without_provenance_mut(ALIVE);
        // SAFETY: the context is alive; there is no data.
        let refused = unsafe { (self.library.iscsi_nop_out_async)(self.context, called_back, null_mut(), 0, id) };
        if refused == 0 { Ok(()) } else { Err(self.error()) }
    }

    /// LOGICAL UNIT RESET: end what anybody has under way there.
    pub fn reset_unit(&mut self, id: usize) -> Result<(), String> {
        let tag = std::ptr::without_provenance_mut(id);
        // SAFETY: the context is alive; there is no data.
        let refused =
            unsafe { (self.library.iscsi_task_mgmt_lun_reset_async)(self.context, self.lun as u32, managed, tag) };
        if refused == 0 { Ok(()) } else { Err(self.error()) }
    }

    /// Send a command. On an error its data comes back.
    pub fn send(&mut self, id: usize, cdb: &[u8], mut data: Data) -> Result<(), (String, Data)> {
        let mut bytes = [0; 16];
        let size = cdb.len().min(16);
        bytes[..size].copy_from_slice(&cdb[..size]);
        let len = data.buffer().map_or(0, |buffer| buffer.len());
        let (Ok(len), direction) = (c_int::try_from(len), data.direction()) else {
            return Err(("a request is too large".into(), data));
        };
        // SAFETY: it copies the command.
        let task = unsafe { (self.library.scsi_create_task)(size as c_int, bytes.as_mut_ptr(), direction, len) };
        if task.is_null() {
            return Err(("libiscsi has no memory".into(), data));
        }
        let pointer = data.buffer_mut().map_or(null_mut(), |buffer| buffer.as_mut_ptr());
        // SAFETY: the task is new; the buffer has `len` bytes, is on the heap and in `flying` before the library can touch it (which it does in `service`).
        let refused = unsafe {
            let added = match &data {
                Data::None => 0,
                Data::In(_) => (self.library.scsi_task_add_data_in_buffer)(task, len, pointer),
                Data::Out(_) => (self.library.scsi_task_add_data_out_buffer)(task, len, pointer),
            };
            let id = std::ptr::without_provenance_mut(id);
            if added != 0 {
                added
            } else {
                (self.library.iscsi_scsi_command_async)(self.context, self.lun, task, called_back, null_mut(), id)
            }
        };
        if refused != 0 {
            let why = self.error();
            // SAFETY: the library has not taken it.
            unsafe { (self.library.scsi_free_scsi_task)(task) };
            return Err((why, data));
        }
        self.flying.insert(id, (task, data));
        Ok(())
    }

    /// What has been called back since the last time, with its data.
    pub fn ended(&mut self) -> Vec<(usize, Said, Data)> {
        let called = CALLED.with_borrow_mut(std::mem::take);
        let mut ended = Vec::new();
        for (id, mut said) in called {
            let Some((task, data)) = self.flying.remove(&id) else {
                ended.push((id, said, Data::None));
                continue;
            };
            // SAFETY: the task is alive until it is freed here, and the library has called back and returned, so it is through with it.
            unsafe {
                (said.key, said.ascq) = ((*task).sense_key, (*task).sense_ascq);
                // 1: underflow.
                said.residual = if (*task).residual_status == 1 { (*task).residual } else { 0 };
                (self.library.scsi_free_scsi_task)(task);
            }
            ended.push((id, said, data));
        }
        ended
    }

    /// End it. What was under way comes back: the target may or may not have done it.
    pub fn close(mut self) -> Vec<(usize, Data)> {
        self.destroy();
        std::mem::take(&mut self.flying)
            .into_iter()
            .map(|(id, (task, data))| {
                // SAFETY: its context is gone, so nobody has it any more.
                unsafe { (self.library.scsi_free_scsi_task)(task) };
                (id, data)
            })
            .collect()
    }

    fn destroy(&mut self) {
        if !self.context.is_null() {
            // SAFETY: it is alive, and not used any more afterwards.
            unsafe { (self.library.iscsi_destroy_context)(self.context) };
            self.context = null_mut();
        }
        CALLED.with_borrow_mut(Vec::clear);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.destroy();
        for (task, _) in std::mem::take(&mut self.flying).into_values() {
            // SAFETY: its context is gone, so nobody has it any more.
            unsafe { (self.library.scsi_free_scsi_task)(task) };
        }
    }
}

impl Data {
    fn buffer(&self) -> Option<&Buffer> {
        match self {
            Data::None => None,
            Data::In(buffer) | Data::Out(buffer) => Some(buffer),
        }
    }
    fn buffer_mut(&mut self) -> Option<&mut Buffer> {
        match self {
            Data::None => None,
            Data::In(buffer) | Data::Out(buffer) => Some(buffer),
        }
    }
    fn direction(&self) -> c_int {
        match self {
            Data::None => 0,
            Data::In(_) => 1,
            Data::Out(_) => 2,
        }
    }
}
