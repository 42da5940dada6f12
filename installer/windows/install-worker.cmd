@echo off
rem Installs or upgrades the worker in WSL2. Untested on Windows.
setlocal
set "here=%~dp0"
wsl.exe --status >nul 2>&1
if errorlevel 1 (
  echo swarmkit: the Windows Subsystem for Linux is not installed. Open a terminal as administrator, enter
  echo.
  echo     wsl --install
  echo.
  echo restart Windows, and start this again.
  pause
  exit /b 1
)
for %%t in ("%here%swarmkit-*-linux.tar.gz") do set "archive=%%~ft"
wsl.exe -e sh -c "set -e; folder=$(mktemp -d); tar xzf \"$(wslpath -u \"$0\")\" -C \"$folder\"; \"$folder\"/*/bootstrap.sh; rm -r \"$folder\"" "%archive%"
if errorlevel 1 (
  echo swarmkit: the worker could not be installed. Look at the messages above.
  pause
  exit /b 1
)
echo swarmkit: the worker is installed. The tray starts it.
pause
