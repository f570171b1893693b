//! A real mail server for tests: Debian's Exim (`tests/mail-peer` fetches it), with TLS and a password, on ports of its own.
//!
//! Exim wants a user of its own in `/etc/passwd`: it gets one in a mount namespace, which needs root.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use understudy_alerts::settings::{Mail, Tls};

/// A user id that nobody else has.
const USER: u32 = 65533;

/// Where mails are taken.
pub const DOMAIN: &str = "works.example";

pub struct Exim {
    dir: tempfile::TempDir,
    program: PathBuf,
    plain: u16,
    implicit: u16,
    running: Option<Child>,
}

/// A condition that comes true, within a bound.
pub fn until<T>(what: &str, why: &dyn Fn() -> String, mut look: impl FnMut() -> Option<T>) -> T {
    let limit = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < limit, "waited in vain for {what}: {}", why());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Exim {
    /// A server that is not running yet; `None`, with a line that says why, where there can be none.
    pub fn prepare() -> Option<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/mail/root");
        let programs = [root.join("usr/sbin/exim4"), "/usr/sbin/exim4".into()];
        let is_root = nix::unistd::geteuid().is_root();
        let Some(program) = programs.into_iter().find(|program| is_root && program.exists()) else {
            eprintln!("SKIPPED: mail tests need root and Exim (tests/mail-peer fetches it)");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let libraries = std::path::absolute(root.join("usr/lib/x86_64-linux-gnu")).unwrap();
        let program = program.canonicalize().unwrap();
        // The server runs itself anew for every delivery, set-uid: LD_LIBRARY_PATH would not count there, the linker's cache does.
        fs::write(dir.path().join("ld.so.conf"), format!("{}\ninclude /etc/ld.so.conf\n", libraries.display()))
            .unwrap();
        let mut linked = Command::new("/sbin/ldconfig");
        linked.arg("-X").arg("-C").arg(dir.path().join("ld.so.cache"));
        let linked = linked.arg("-f").arg(dir.path().join("ld.so.conf")).output().unwrap();
        assert!(linked.status.success(), "{linked:?}");
        let exim = Self { dir, program, plain: free_port(), implicit: free_port(), running: None };
        exim.write();
        Some(exim)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self) {
        let mut authority = rcgen::CertificateParams::new(vec![]).unwrap();
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority_key = rcgen::KeyPair::generate().unwrap();
        let certificate = authority.self_signed(&authority_key).unwrap();
        fs::write(self.path("ca.pem"), certificate.pem()).unwrap();
        let issuer = rcgen::Issuer::new(authority, authority_key);
        let server_key = rcgen::KeyPair::generate().unwrap();
        let server = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
        fs::write(self.path("cert.pem"), server.signed_by(&server_key, &issuer).unwrap().pem()).unwrap();
        fs::write(self.path("key.pem"), server_key.serialize_pem()).unwrap();
        fs::write(self.path("password"), "study\n").unwrap();
        for (file, line) in
            [("passwd", "Debian-exim:x:65533:65533::/:/bin/false\n"), ("group", "Debian-exim:x:65533:\n")]
        {
            let there = fs::read_to_string(format!("/etc/{file}")).unwrap();
            let others = there.lines().filter(|l| !l.starts_with("Debian-exim:")).map(|l| format!("{l}\n"));
            fs::write(self.path(file), others.collect::<String>() + line).unwrap();
        }
        for sub in ["spool", "mail"] {
            fs::create_dir(self.path(sub)).unwrap();
            chown(self.path(sub), Some(USER), Some(USER)).unwrap();
        }
        chown(self.path("key.pem"), Some(USER), Some(USER)).unwrap();
        let (dir, plain, implicit) = (self.dir.path().display(), self.plain, self.implicit);
        let program = self.program.display();
        let config = format!(
            "exim_path = {program}\nprimary_hostname = mail.example\nspool_directory = {dir}/spool\nlog_file_path = {dir}/spool/%slog\n\
             pid_file_path = {dir}/spool/pid\ndaemon_smtp_ports = {plain} : {implicit}\nlocal_interfaces = 127.0.0.1\n\
             tls_on_connect_ports = {implicit}\ntls_advertise_hosts = *\ntls_certificate = {dir}/cert.pem\n\
             tls_privatekey = {dir}/key.pem\ndomainlist local_domains = {DOMAIN}\nacl_smtp_rcpt = rcpt\nacl_smtp_data = data\n\
             never_users =\nhost_lookup =\nrfc1413_query_timeout = 0s\nkeep_environment =\n\
             begin acl\n\
             rcpt:\n  deny condition = ${{if eq{{$tls_in_cipher}}{{}}}}\n  deny message = log in first\n    !authenticated = *\n\
             \x20 accept domains = +local_domains\n  deny message = no relaying\n\
             data:\n  accept\n\
             begin routers\nall:\n  driver = accept\n  transport = file\n\
             begin transports\nfile:\n  driver = appendfile\n  directory = {dir}/mail\n  maildir_format\n  create_directory\n\
             \x20 user = Debian-exim\n  group = Debian-exim\n\
             begin authenticators\nplain:\n  driver = plaintext\n  public_name = PLAIN\n  server_prompts = :\n\
             \x20 server_condition = ${{if and{{{{eq{{$auth2}}{{under}}}}{{eq{{$auth3}}{{study}}}}}}}}\n  server_set_id = $auth2\n\
             \x20 server_advertise_condition = ${{if def:tls_in_cipher}}\n"
        );
        fs::write(self.path("exim.conf"), config).unwrap();
    }

    /// Run it; back when it takes connections.
    pub fn start(&mut self) {
        let script = "mount --bind \"$1/passwd\" /etc/passwd && mount --bind \"$1/group\" /etc/group && \
                      mount --bind \"$1/ld.so.cache\" /etc/ld.so.cache && \
                      exec \"$2\" -C \"$1/exim.conf\" -bdf";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "exim"]);
        command.arg(self.dir.path()).arg(&self.program);
        let errors = fs::File::create(self.path("stderr")).unwrap();
        self.running = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn().unwrap());
        for port in [self.plain, self.implicit] {
            until("Exim to listen", &String::new, || {
                if let Ok(Some(status)) = self.running.as_mut().unwrap().try_wait() {
                    panic!("Exim ended ({status}): {}", fs::read_to_string(self.path("stderr")).unwrap());
                }
                TcpStream::connect(("127.0.0.1", port)).ok()
            });
        }
    }

    pub fn started() -> Option<Self> {
        let mut exim = Self::prepare()?;
        exim.start();
        Some(exim)
    }

    /// The way to it.
    pub fn settings(&self, tls: Tls) -> Mail {
        Mail {
            server: "localhost".into(),
            port: Some(if tls == Tls::Implicit { self.implicit } else { self.plain }),
            tls,
            user: Some("under".into()),
            password_file: Some(self.path("password")),
            ca_file: Some(self.path("ca.pem")),
            from: Some("understudy@n1.example".into()),
            reply_to: Some("answers@works.example".into()),
        }
    }

    /// The mails that have arrived, when there are so many.
    pub fn mails(&self, count: usize) -> Vec<Vec<u8>> {
        // What the server says of it, if they do not come.
        let log = || fs::read_to_string(self.path("spool/mainlog")).unwrap_or_default();
        until(&format!("{count} mails"), &log, || {
            let entries = fs::read_dir(self.path("mail/new")).ok()?;
            let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
            files.sort();
            (files.len() >= count).then(|| files.iter().map(|file| fs::read(file).unwrap()).collect())
        })
    }
}

impl Drop for Exim {
    fn drop(&mut self) {
        if let Some(mut child) = self.running.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
