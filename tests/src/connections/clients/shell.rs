//! One SSH session: a shell that counts by itself and says back what it is told.

use std::io::{BufRead, BufReader, Write};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};

use super::{Home, Kind};
use crate::connections::judge::{Said, Shell};
use crate::connections::switch::guest;

/// In the guest.
const SHELL: &str =
    r#"i=0; (while :; do i=$((i+1)); echo "tick $i"; sleep 2; done) & while read -r line; do echo "echo $line"; done"#;

/// Until the end.
pub fn run(home: &Home) -> Result<()> {
    let mut ssh = Command::new("ssh");
    ssh.args(["-T", "-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new"]);
    ssh.arg("-o").arg(format!("UserKnownHostsFile={}", home.dir.join("known_hosts").display()));
    ssh.arg("-i").arg(home.dir.join("ssh")).arg(format!("root@{}", guest())).arg(SHELL);
    let mut program = home.program(&ssh)?;
    let (input, output) = (program.input.take(), program.output.take());
    let (mut input, output) = input.zip(output).context("ssh without input and output")?;
    let shell = Mutex::new(Shell::default());
    let lock = || shell.lock().unwrap_or_else(PoisonError::into_inner);
    thread::scope(|scope| {
        scope.spawn(move || {
            while !home.stopping() {
                let number = lock().tell();
                if input.write_all(format!("{number}\n").as_bytes()).is_err() {
                    return;
                }
                thread::sleep(home.pause());
            }
        });
        let heard = || -> Result<()> {
            for line in BufReader::new(output).lines() {
                let mut shell = lock();
                let said = shell.line(&line.context("listening to ssh")?).map_err(anyhow::Error::msg)?;
                let (echoes, ticks) = (shell.echoes, shell.ticks);
                drop(shell);
                let count = |totals: &mut super::Totals| (totals.ssh_echoes, totals.ssh_ticks) = (echoes, ticks);
                match said {
                    Said::Echo => home.beat_and(Kind::Ssh, |state| count(&mut state.totals)),
                    Said::Tick => count(&mut home.state().totals),
                }
            }
            program.end()
        };
        let heard = heard();
        // Whoever writes to it is to end too.
        let _ = program.child.kill();
        heard
    })
}
